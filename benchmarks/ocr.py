"""PP-OCRv6 in int8 against float: 100 rendered words are recognized, and text is detected on 20 rendered pages.

The files are those of the wheel `rapidocr`. Each is imported, compressed with examples/int8.yaml (calibrated on 128
other words, 32 other pages; benchmarks/ocr_rendered.py draws them all), and the file that comes out is run in ONNX
Runtime and OpenVINO by their own interfaces, beside the original in ONNX Runtime.

- Recognition: the text of each word (the likeliest character of each column, repeats and blanks left out), against
  the original's and against what was rendered; characters by edit distance.
- Detection: where the map of probabilities is above 0.3, pixel by pixel (intersection over union), and boxes: connected
  parts with a mean of at least 0.5, made larger as DB does (by 1.6 times area over perimeter). A box is the same, and a
  line is found, from an intersection over union of 0.5 on.
- The head: what int8 costs of the variance of the outputs, and what with the last layer that has weights in float.

    python benchmarks/ocr.py --ocr DIR            with the .onnx files of rapidocr/models
    python benchmarks/ocr.py --ocr DIR --only recognition

Results go to benchmarks/results/ocr.json. Needs onnxruntime, openvino, scipy, pillow and TrueType fonts.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ocr_rendered import PAGE, WORD, Page, as_input, fonts_in, page, word_picture, words_of
from timm_networks import _onnxruntime, _openvino
from torch import nn

import tersenet
import tersenet.ship
from tersenet.deploy.apart import measure_apart
from tersenet.deploy.machine import machine
from tersenet.numerics.outputs import floats
from tersenet.onnx_import import open_onnx
from tersenet.quantization.quantize import Quantize
from tersenet.quantization.remedies import lost
from tersenet.recipe import Recipe
from tersenet.task import Preparation

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ocr.json"
RECIPE = ROOT / "examples" / "int8.yaml"
FILES = {"recognition": "PP-OCRv6_rec_small.onnx", "detection": "PP-OCRv6_det_small.onnx"}
RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino}
TEACH, JUDGE = slice(0, None, 2), slice(1, None, 2)  # words of the calibration, words that are judged
WORDS, PAGES, TEACHING_WORDS, TEACHING_PAGES = 100, 20, 128, 32
MAP, BOX, UNCLIP, SAME = 0.3, 0.5, 1.6, 0.5
Box = tuple[float, float, float, float]  # left, top, right, bottom


def recognition(path: Path, fonts: list[Path], folder: Path) -> dict[str, Any]:
    """Figures on words: of the original, of the int8 file in each runtime."""
    truth, judged = _words(JUDGE, WORDS, 2, fonts)
    _, teaching = _words(TEACH, TEACHING_WORDS, 1, fonts)
    characters = _characters(path)
    texts = functools.partial(_texts, characters=characters)
    reference = texts(_run(_onnxruntime, path, judged, 20))
    row, made = _compressed(path, WORD, teaching, folder)
    row["words"] = WORDS
    row["float"] = {"right": _same(reference, truth), "characters_right": _alike(reference, truth)}
    for name, runtime in RUNTIMES.items():
        found = texts(_run(runtime, made, judged, 20))
        row[name] = {
            "same_as_float": _same(found, reference), "characters_same": _alike(found, reference),
            "right": _same(found, truth), "characters_right": _alike(found, truth),
            "others": [list(pair) for pair in zip(found, reference, strict=True) if pair[0] != pair[1]],
        }  # fmt: skip
    return row


def detection(path: Path, fonts: list[Path], folder: Path) -> dict[str, Any]:
    """Figures on pages: of the original, of the int8 file in each runtime."""
    pages = _pages(JUDGE, PAGES, 4, fonts)
    teaching = as_input([each.pixels for each in _pages(TEACH, TEACHING_PAGES, 3, fonts)], PAGE[1])
    judged = as_input([each.pixels for each in pages], PAGE[1])
    reference = _run(_onnxruntime, path, judged, 1)[:, 0]
    row, made = _compressed(path, PAGE, teaching, folder)
    row |= {"pages": PAGES, "lines": sum(len(each.boxes) for each in pages)}
    boxes = [_boxes(each) for each in reference]
    row["float"] = {"boxes": sum(map(len, boxes)), "lines_found": _lines(boxes, pages)}
    for name, runtime in RUNTIMES.items():
        maps = _run(runtime, made, judged, 1)[:, 0]
        found = [_boxes(each) for each in maps]
        both = [(_matched(a, b), len(a) + len(b)) for a, b in zip(found, boxes, strict=True)]
        row[name] = {
            "pixels_iou": _share(((maps > MAP) & (reference > MAP)).sum(), ((maps > MAP) | (reference > MAP)).sum()),
            "pixels_same": _share(((maps > MAP) == (reference > MAP)).sum(), maps.size),
            "largest_mean_difference": float(f"{np.abs(maps - reference).mean((1, 2)).max():.3g}"),
            "boxes": sum(map(len, found)),
            "boxes_same_f1": _share(2 * sum(each for each, _ in both), sum(count for _, count in both)),
            "lines_found": _lines(found, pages),
        }
    return row


def _words(share: slice, count: int, seed: int, fonts: list[Path]) -> tuple[list[str], torch.Tensor]:
    random = np.random.default_rng(seed)
    words = words_of(share, count, seed)
    return words, as_input([word_picture(word, fonts, random) for word in words], WORD[1])


def _pages(share: slice, count: int, seed: int, fonts: list[Path]) -> list[Page]:
    random = np.random.default_rng(seed)
    words = words_of(share, 800, seed)
    return [page(words, fonts, random) for _ in range(count)]


def _compressed(path: Path, size: tuple[int, int], teaching: torch.Tensor, folder: Path) -> tuple[dict[str, Any], Path]:
    """(figures, the int8 .onnx file): compressed as examples/int8.yaml says, for both runtimes."""
    started = time.perf_counter()
    model, _ = open_onnx(path, size)
    calibration = list(teaching.split(16))
    preparation = Preparation(size)  # PP-OCR: pixels from -1 to 1
    task = tersenet.Task(teaching[:2], calibrate=calibration, preparation=preparation, quiet=True)
    run = tersenet.compress(model, task, Recipe.read(RECIPE), out=folder, runtimes=tuple(RUNTIMES))
    seconds = round(time.perf_counter() - started, 1)
    made = folder / "model.onnx"
    row = run.report["rows"][-1]
    return {
        "file": path.name,
        "bytes": {"float": path.stat().st_size, "int8": made.stat().st_size},
        "seconds": seconds,
        "findings": row.get("findings", []),
        "left_in_float": row.get("left_alone", []),
        "head": _head(model, task),
    }, made


def _head(model: nn.Module, task: tersenet.Task) -> dict[str, Any]:
    """Shares of the outputs' variance that int8 costs, with the last quantized layer in int8 and in float."""
    step = next(each for each in Recipe.read(RECIPE).steps if isinstance(each, Quantize))
    inputs = task.inputs_like(model, 32)
    costs = {}
    plan = step.plan(model, task)
    last = list(plan["layers"])[-1]
    for name, each in (("int8", step), ("float", dataclasses.replace(step, skip=(last,)))):
        made, _ = each.run(copy.deepcopy(model), task)
        with torch.no_grad():
            costs[name] = float(f"{lost(floats(model(*inputs)), floats(made(*inputs))):.3g}")
    return {"layer": last, "outputs_lost": costs}


def _run(runtime: Any, path: Path, x: torch.Tensor, batch: int) -> np.ndarray:
    return np.concatenate([runtime(path, part) for part in x.split(batch)])


def _characters(path: Path) -> list[str]:
    """What each output of recognition stands for: 0 is the blank, the last one a space."""
    import onnx

    said = next(each.value for each in onnx.load(path).metadata_props if each.key == "character")
    return ["", *said.split("\n"), " "]


def _texts(outputs: np.ndarray, characters: list[str]) -> list[str]:
    texts = []
    for row in outputs.argmax(-1):
        changes = row[np.flatnonzero(np.diff(row, prepend=0))]
        texts.append("".join(characters[place] for place in changes if place))
    return texts


def _same(found: list[str], wanted: list[str]) -> int:
    return sum(a == b for a, b in zip(found, wanted, strict=True))


def _alike(found: list[str], wanted: list[str]) -> float:
    """Share of the wanted characters that are there: 1 minus edit distances over lengths."""
    wrong = sum(_edits(a, b) for a, b in zip(found, wanted, strict=True))
    return round(1 - wrong / sum(map(len, wanted)), 4)


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def _boxes(probabilities: np.ndarray) -> list[Box]:
    """Boxes of one page (H, W)."""
    from scipy import ndimage

    labels, count = ndimage.label(probabilities > MAP)
    means = ndimage.mean(probabilities, labels, range(1, count + 1))
    boxes = []
    for (rows, columns), mean in zip(ndimage.find_objects(labels), means, strict=True):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if mean >= BOX and min(height, width) >= 3:
            edge = UNCLIP * height * width / (2 * (height + width))
            boxes.append((columns.start - edge, rows.start - edge, columns.stop + edge, rows.stop + edge))
    return boxes


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (a, b)]
    return shared / (sum(areas) - shared)


def _matched(found: list[Box], wanted: list[Box]) -> int:
    """How many of the wanted boxes are found, each found one used once."""
    left, count = list(found), 0
    for box in wanted:
        best = max(left, key=functools.partial(_iou, box), default=None)
        if best is not None and _iou(box, best) >= SAME:
            left.remove(best)
            count += 1
    return count


def _lines(boxes: list[list[Box]], pages: list[Page]) -> int:
    return sum(_matched(found, each.boxes) for found, each in zip(boxes, pages, strict=True))


def _share(part: Any, of: Any) -> float:
    return round(float(part) / float(of), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ocr", type=Path, required=True, help="the folder of PP-OCR's .onnx files")
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts/truetype"), help="a folder of .ttf files")
    parser.add_argument("--only", choices=tuple(FILES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tersenet.ship.measure_apart = functools.partial(measure_apart, calls=5, discard=0)  # type: ignore[attr-defined]
    fonts = fonts_in(arguments.fonts)
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, file in FILES.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                work = {"recognition": recognition, "detection": detection}[name]
                result[name] = work(arguments.ocr / file, fonts, Path(folder) / "run")
            result |= {"machine": machine(), "fonts": [path.stem for path in fonts]}
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
            print(name, json.dumps(result[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
