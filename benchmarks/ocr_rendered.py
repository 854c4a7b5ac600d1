"""Rendered words and pages, as recognition and detection of PP-OCR take them: many fonts, sizes, angles and colors.

Text is that of Python's own help (`pydoc_data.topics`), fonts are the TrueType files of a folder that have Latin
letters. All is drawn from a seed: words and pages of two seeds share no word, font sizes, angles and noise are drawn
anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WORD = (48, 320)  # H, W that recognition reads
PAGE = (640, 640)
_SUPERSAMPLE = 2
_UNFIT = re.compile(r"math|symbol|emoji|dingbat|noto.*cjk", re.IGNORECASE)
_EDGE = 6  # of a word's picture, in pixels of a height of 48


@dataclass(frozen=True)
class Page:
    """pixels (H, W, 3) of 0 to 255; boxes (left, top, right, bottom) of its lines, in pixels."""

    pixels: np.ndarray
    boxes: list[tuple[float, float, float, float]]


def fonts_in(folder: Path) -> list[Path]:
    """The TrueType files of a folder, by name."""
    found = sorted(path for path in folder.rglob("*.ttf") if not _UNFIT.search(path.name))
    if not found:
        raise SystemExit(f"{folder} holds no .ttf files; name a folder that does with --fonts")
    return found


def vocabulary() -> list[str]:
    """Words of 3 to 12 letters from Python's help, each once, however it is capitalized there."""
    from pydoc_data.topics import topics

    words = sorted(word for text in topics.values() for word in re.findall(r"\b[A-Za-z]{3,12}\b", text))
    return list({word.lower(): word for word in words}.values())


def words_of(share: slice, count: int, seed: int) -> list[str]:
    """Words from a slice of the vocabulary in shuffled order: in small letters, capitals, or with digits and signs.

    Args:
        share: what part of the vocabulary; disjoint slices give disjoint words.
        count: how many.
        seed: of the drawing.
    """
    order = np.random.default_rng(0).permutation(vocabulary())[share]
    random = np.random.default_rng(seed)
    forms = (str, str.lower, str.upper, str.capitalize, lambda word: f"{word[:7]}-{random.integers(10, 9999)}",
             lambda word: f"${random.integers(1, 999)}.{random.integers(10, 99)}",
             lambda word: f"{word[:6]}@{word[-4:]}.org")  # fmt: skip
    weights = np.array([4, 3, 2, 3, 1, 1, 1], float)
    return [
        str(forms[random.choice(len(forms), p=weights / weights.sum())](str(word)))
        for word in random.choice(order, count, replace=False)
    ]


def word_picture(text: str, fonts: list[Path], random: np.random.Generator) -> np.ndarray:
    """One word, (48, W, 3) with W at most 320, of 0 to 255: tilted by up to 4 degrees, blurred, noisy."""
    size = int(random.integers(18, 44)) * _SUPERSAMPLE
    font = ImageFont.truetype(str(fonts[random.integers(len(fonts))]), size)
    left, top, right, bottom = font.getbbox(text)
    edge = int(size * random.uniform(0.15, 0.4))
    ink, paper = _colors(random)
    image = Image.new("RGB", (int(right - left) + 2 * edge, int(bottom - top) + 2 * edge), paper)
    ImageDraw.Draw(image).text((edge - left, edge - top), text, font=font, fill=ink)
    angle = float(random.normal(0, 1.3))
    image = image.rotate(float(np.clip(angle, -4, 4)), Image.Resampling.BICUBIC, expand=False, fillcolor=paper)
    width = min(WORD[1], max(16, round(image.width * WORD[0] / image.height)))
    image = image.resize((width, WORD[0]), Image.Resampling.BILINEAR)
    return _spoiled(image, random)


def page(words: list[str], fonts: list[Path], random: np.random.Generator) -> Page:
    """A page of 640x640 with lines of text in several sizes and fonts, in one or two columns, a rule and a box."""
    ink, paper = _colors(random, plain=0.6)
    scale = _SUPERSAMPLE
    image = Image.new("RGB", (PAGE[1] * scale, PAGE[0] * scale), paper)
    draw = ImageDraw.Draw(image)
    boxes: list[tuple[float, float, float, float]] = []
    columns = int(random.integers(1, 3))
    span = PAGE[1] // columns
    for column in range(columns):
        y = float(random.integers(14, 60))
        while True:
            size = int(random.choice([14, 16, 18, 20, 24, 30, 40]))
            font = ImageFont.truetype(str(fonts[random.integers(len(fonts))]), size * scale)
            x = column * span + float(random.integers(12, 40))
            text = _line(words, font, (column + 1) * span - 10 - x, random)
            left, top, right, bottom = (each / scale for each in font.getbbox(text))
            if y + bottom > PAGE[0] - 10:
                break
            if text:
                draw.text((x * scale, y * scale), text, font=font, fill=ink)
                boxes.append((x + left, y + top, x + right, y + bottom))
            y += bottom + size * float(random.uniform(0.5, 1.6))
        if random.random() < 0.3:
            draw.line([(column * span * scale + 20, y * scale), ((column + 1) * span * scale - 20, y * scale)], ink, 2)
    image = image.resize((PAGE[1], PAGE[0]), Image.Resampling.LANCZOS)
    return Page(_spoiled(image, random), boxes)


def as_input(pictures: list[np.ndarray], width: int) -> torch.Tensor:
    """Pictures (H, W', 3) as (N, 3, H, width) in [-1, 1], channels as OpenCV has them (BGR), padded with 0 at the
    right, as PP-OCR does."""
    batch = np.zeros((len(pictures), 3, pictures[0].shape[0], width), np.float32)
    for row, picture in zip(batch, pictures, strict=True):
        row[:, :, : picture.shape[1]] = (picture[:, :, ::-1].astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)
    return torch.from_numpy(batch)


def _line(words: list[str], font: ImageFont.FreeTypeFont, width: float, random: np.random.Generator) -> str:
    """As many words as fit, up to a number that is drawn."""
    text = ""
    for word in random.choice(words, int(random.integers(1, 9))):
        longer = f"{text} {word}".strip()
        if font.getlength(longer) > width * _SUPERSAMPLE:
            break
        text = longer
    return text


def _colors(random: np.random.Generator, plain: float = 0.5) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper, with at least 90 of 255 between their means; black on white in the share `plain`."""
    if random.random() < plain:
        return (0, 0, 0), (255, 255, 255)
    while True:
        ink, paper = (tuple(int(each) for each in random.integers(0, 256, 3)) for _ in range(2))
        if abs(sum(ink) - sum(paper)) > 3 * 90:
            return ink, paper


def _spoiled(image: Image.Image, random: np.random.Generator) -> np.ndarray:
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0.2, 0.9))))
    pixels = np.asarray(image, np.float32) + random.normal(0, float(random.uniform(0, 12)), (*image.size[::-1], 1))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
