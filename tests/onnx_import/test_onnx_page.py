"""docs/onnx.md shows what the logs say, and rendered words are of one kind and share none between uses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import onnx_page  # noqa: E402


def test_the_page_shows_the_logs() -> None:
    text = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    assert onnx_page.MARKS.search(text)
    assert onnx_page.filled(text) == text, "run python benchmarks/onnx_page.py"


def test_words_that_are_judged_were_not_calibrated_on() -> None:
    pytest.importorskip("PIL")
    import ocr_rendered

    first, again = (ocr_rendered.words_of(slice(0, None, 2), 800, 1) for _ in range(2))
    other = ocr_rendered.words_of(slice(1, None, 2), 800, 2)
    assert first == again
    assert not {word.lower() for word in first} & {word.lower() for word in other}


def test_recognized_texts_and_edits() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    import ocr

    places = np.array([[0, 1, 1, 0, 1, 2, 2, 0], [2, 2, 2, 2, 2, 2, 2, 1]])
    assert ocr._texts(np.eye(3)[places], ["", "a", "b"]) == ["aab", "ba"]
    assert [ocr._edits(a, b) for a, b in (("", "abc"), ("abc", "axc"), ("kitten", "sitting"))] == [3, 1, 3]
    assert ocr._alike(["abcd", "xy"], ["abcd", "xyzw"]) == 0.75


def test_boxes_are_matched_once() -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    import ocr

    page = np.zeros((40, 60))
    page[10:14, 10:30] = 0.9
    page[30:32, 5:50] = 0.9  # too thin
    page[20:26, 40:50] = 0.4  # too faint
    (box,) = ocr._boxes(page)
    edge = 1.6 * 80 / 48
    assert box == pytest.approx((10 - edge, 10 - edge, 30 + edge, 14 + edge))
    assert ocr._matched([box], [box, box]) == 1
    assert ocr._matched([(0, 0, 10, 10)], [(0, 6, 10, 16)]) == 0
