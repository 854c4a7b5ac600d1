"""Encoded images to 8-bit arrays of one size.

Decoding CIFAR-10's 50,000 images takes longer than scoring a small network on them, so it is done once: `image_cache`
keeps the arrays. Images that cannot be read are named; nothing is replaced by a blank.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.data import image_cache
from tersenet.data.image_cache import Pixels
from tersenet.data.pixels import MODES, Span, frames_of, is_grey, is_transparent, pixels, span_of, wide_values
from tersenet.errors import DataError, InputWarning, SettingsError, require
from tersenet.task import Preparation


@dataclass(frozen=True)
class Encoded:
    """Images as they are stored.

    Args:
        names: what to call each image in a message: its file, or its row.
        read: index -> a path, or the bytes of a file (for the digits: an array).
        labels: (N,) class numbers.
        key: a hash of the images' bytes, made when it is asked for; None means that nothing is cached.
    """

    names: Sequence[str]
    read: Callable[[int], Any]
    labels: np.ndarray
    key: Callable[[], str] | None


@dataclass(frozen=True)
class Decoded:
    """images (N, C, H, W) uint8, labels (N,) int64, the names of the images that were left out, and a hash of the bytes
    that the images were decoded from, where it is known."""

    images: np.ndarray
    labels: np.ndarray
    bad: tuple[str, ...]
    contents: str | None = None


def decode(
    encoded: Encoded, preparation: Preparation, what: str, on_bad_image: str = "stop", quiet: bool = False
) -> Decoded:
    """Decodes all images, or reads them from the cache.

    Args:
        encoded: the images.
        preparation: size and channels.
        what: the data in words, for messages and the progress bar.
        on_bad_image: "stop" raises at the first image that cannot be read; "skip" leaves it out and warns once.
        quiet: no progress bar (it is on standard error).
    Raises:
        DataError: for an image that cannot be read, when no image is left, or for channels other than 1 and 3.
        SettingsError: for another `on_bad_image`.
    """
    if on_bad_image not in ("stop", "skip"):
        raise SettingsError(f"on_bad_image must be 'stop' or 'skip', got {on_bad_image!r}")
    if preparation.channels not in MODES:
        raise DataError(f"images are read with 1 or 3 channels, but the preparation has {preparation.channels}")
    place = None if encoded.key is None else image_cache.place_of(encoded.key(), preparation)
    found = None if place is None else image_cache.load(place, len(encoded.names))
    if found is None:
        found = _decode(encoded, preparation, what, on_bad_image, quiet)
        if place is not None:
            image_cache.store(place, found)
    bad = tuple(encoded.names[index] for index in found.bad)
    if bad and on_bad_image == "stop":
        raise DataError(_unreadable(what, bad[0], ""))
    if bad:
        warnings.warn(f"{len(bad)} unreadable images of {what} were left out, first {bad[0]}", stacklevel=2)
    if len(found.images) == 0:
        raise DataError(f"{what} has no image that can be read (0 samples); give at least one")
    for sentence in _sentences(found.facts, encoded, preparation, what):
        warnings.warn(sentence, InputWarning, stacklevel=2)
    kept = np.delete(encoded.labels, np.asarray(found.bad, np.int64))
    return Decoded(found.images, kept.astype(np.int64), bad, None if place is None else place.name)


def _sentences(facts: dict[str, Any], encoded: Encoded, preparation: Preparation, what: str) -> Iterator[str]:
    """What was seen while decoding and changes what a model gets to see."""
    if "transparent" in facts:
        yield (
            f"{encoded.names[facts['transparent']]} and perhaps more images of {what} have transparent pixels, whose "
            "hidden colors are read as they are"
        )
    if "frames" in facts:
        yield (
            f"{encoded.names[facts['frames']]} and perhaps more images of {what} have several frames or pages, of "
            "which the first alone is read"
        )
    if "colour" in facts and preparation.channels == 1:
        yield (
            f"{encoded.names[facts['colour']]} and perhaps more images of {what} have colors and are turned to grey, "
            "because the model takes 1 channel"
        )
    if facts.get("grey") and preparation.channels == 3:
        yield f"all images of {what} are grey, and are repeated over the 3 channels that the model takes"
    if "span" in facts:
        span = Span(*facts["span"])
        dark = "; that leaves them dark: scale them to the whole range" if 255 < span.high < 16384 else ""
        if span.high < 16384:  # else they fill their 16 bits, and nothing else could be meant
            yield (
                f"{what} has images of more than 8 bits with values from {span.low:g} to {span.high:g}, of which "
                f"{span.white:g} is taken for white{dark}"
            )


def _decode(encoded: Encoded, preparation: Preparation, what: str, on_bad_image: str, quiet: bool) -> Pixels:
    from rich.console import Console
    from rich.progress import track

    pillow = require("PIL.Image", "data", "decode images")
    count = len(encoded.names)
    images = np.empty((count, preparation.channels, *preparation.size), np.uint8)
    good, bad = [], []
    facts: dict[str, Any] = {}
    span = None
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal  # a log would get an empty line of it
    numbers = track(range(count), f"decoding {what}", console=console, transient=True, disable=hidden)
    for index in numbers:
        try:
            image = opened(encoded.read(index))
            if span is None and wide_values(image) is not None:
                span = _span(encoded)
            images[index] = pixels(image, preparation, span)
            _note(facts, image, index)
        except Exception as error:  # PIL's decoders raise many kinds on damaged files
            if on_bad_image == "stop":
                # PIL would tell the address of the bytes in memory.
                why = "" if isinstance(error, pillow.UnidentifiedImageError) else f" ({error})"
                raise DataError(_unreadable(what, encoded.names[index], why)) from error
            bad.append(index)
            continue
        good.append(index)
    if span is not None:
        facts["span"] = [span.low, span.high, span.fractions]
    # Of one channel all of them: equal channels are no surprise.
    facts["grey"] = "grey" in facts and "colour" not in facts and "equal" not in facts
    return Pixels(images[good] if bad else images, tuple(bad), facts)


def opened(source: Any) -> Any:
    """A PIL image of a path or of bytes; an array stays what it is."""
    if isinstance(source, np.ndarray):
        return source
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise ValueError("it is empty, 0 bytes")
    image = require("PIL.Image", "data", "decode images").open(io.BytesIO(data))
    image.load()
    return image


def _note(facts: dict[str, Any], image: Any, index: int) -> None:
    """Keeps the first image with colors, with transparent pixels and with several frames; looks no further then."""
    one_channel = not isinstance(image, np.ndarray) and len(image.getbands()) < 3 and image.mode not in ("P", "PA")
    if one_channel:
        facts["grey"] = True
    elif "colour" not in facts and not is_grey(image):
        facts["colour"] = index
    elif "colour" not in facts:
        facts["equal"] = True
    if "frames" not in facts and frames_of(image) > 1:
        facts["frames"] = index
    if "transparent" not in facts and is_transparent(image):
        facts["transparent"] = index


def _span(encoded: Encoded) -> Span | None:
    """The values of all images of more than 8 bits. What cannot be read is named when its turn comes."""
    span = None
    for index in range(len(encoded.names)):
        try:
            values = wide_values(opened(encoded.read(index)))
        except Exception:  # noqa: BLE001 - as above
            continue
        if values is not None:
            span = span_of(values).joined(span)
    return span


def _unreadable(what: str, name: str, why: str) -> str:
    return (
        f"{name} of {what} is not an image that can be read{why}; mend or remove it, "
        "or skip such images (--on-bad-image skip)"
    )
