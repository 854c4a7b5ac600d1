"""The verdict says good and bad news in plain words; the comparisons under it are checked by hand."""

from __future__ import annotations

import doctest

import pytest

from tersenet.numerics.intervals import wilson
from tersenet.numerics.scale import Scale
from tersenet.report import words
from tersenet.report.headline import Change, first_runtime, latency_change, missed_by, verdict


def latency(median, spread=0.01, **more):
    return {
        "median": median,
        "low": median * (1 - spread),
        "high": median * (1 + spread),
        "threads": 1,
        "batch": 1,
        **more,
    }


def made(hits=9150, size=500, time=1.0, targets=(), settings=None, **more):
    """A report of two rows: an original of 1000 bytes as .onnx and 950 as .terse, 240 weights, 1.9 ms and 91.73 %, and
    what became of it: so many bytes as .onnx, 380 as .terse."""

    def row(step, hits, sizes, times):
        score = (
            {}
            if hits is None
            else {"score": hits / 10000, "score_interval": list(wilson(hits, 10000)), "samples": 10000}
        )
        return {"step": step, **score, "file_bytes": sizes, "latency_ms": times}

    first = row("original", None if hits is None else 9173, {"onnx": 1000, "terse": 950}, {"onnxruntime": latency(1.9)})
    last = row(
        "quantize", hits, {"onnx": size, "terse": 380}, {} if time is None else {"onnxruntime": latency(time, **more)}
    )
    first["params"] = 240
    return {"settings": settings or {}, "rows": [first, last], "targets": list(targets)}


def test_the_sentence_of_the_design():
    assert verdict(made(size=476)) == (
        "The .onnx file is 2.1x smaller (0.48 of the bytes) and 1.9x faster in ONNX Runtime (0.53 of the time) than "
        "the original's, at 0.23 points of accuracy lost (91.50 % of 10,000 images, 95 % interval 90.9-92.0, "
        "which holds the original's 91.73 %); the .terse file is 2.5x smaller (0.40 of the bytes) than the original's "
        "lossless .terse and 2.5x smaller (0.40 of the bytes) than its float32 weights"
    )


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (made(time=1.9), "2.0x smaller (0.50 of the bytes) but NOT faster in ONNX Runtime (1.00 of the time)"),
        (made(time=1.88), "NOT faster in ONNX Runtime (0.99 of the time)"),
        (made(time=3.04), "2.0x smaller (0.50 of the bytes) but 1.6x SLOWER in ONNX Runtime (1.60 of the time)"),
        (made(size=1000), "The .onnx file is not smaller (1.00 of the bytes) but 1.9x faster"),
        (made(size=1300, time=3.04), "The .onnx file is 1.3x LARGER (1.30 of the bytes) and 1.6x SLOWER"),
        (made(time=None), "than the original's (latency was not compared)"),
        (
            made(hits=8900),
            "at 2.73 points of accuracy lost (89.00 % of 10,000 images, 95 % interval 88.4-89.6, which lies below",
        ),
        (made(hits=9200), "with 0.27 points of accuracy gained (92.00 % of 10,000 images"),
        (made(hits=9173), "with no accuracy lost (91.73 %"),
        (made(hits=None), "with no score measured"),
        (made() | {"metric": Scale("mIoU").to_json()}, "0.23 points of mIoU lost (91.50 % of 10,000 images"),
        (made() | {"metric": Scale("MAE", "px", False).to_json()}, "with 0.0023 px of MAE gained (0.915 px on 10,000"),
        (
            made(hits=9300) | {"metric": Scale("MAE", "px", False).to_json()},
            "at 0.0127 px of MAE lost (0.93 px on 10,000 images, 95 % interval 0.9248-0.9348, which lies above the "
            "original's 0.9173 px)",
        ),
        (made() | {"preparation": {"inputs": [{"shape": [16], "dtype": "int64"}]}}, "91.50 % of 10,000 samples"),
        (made(settings={"samples_are": "digits"}), "of 10,000 digits"),
    ],
)
def test_wording(report, said):
    assert said in verdict(report)


def test_each_file_is_held_against_its_like():
    said = verdict(made(size=900))
    assert "The .onnx file is 1.1x smaller (0.90 of the bytes)" in said  # 900 of 1000, not 380 of them
    report = made()
    del report["rows"][0]["file_bytes"]["terse"]
    assert "; the .terse file is 2.5x smaller (0.40 of the bytes) than its float32 weights" in verdict(report)
    del report["rows"][1]["file_bytes"]["terse"]
    assert ".terse" not in verdict(report)


def test_in_pytorch_the_pt2_file_is_the_one_that_is_deployed():
    report = made(settings={"runtime": "pytorch"})
    for row, size in zip(report["rows"], (1100, 550), strict=True):
        row["latency_ms"] = {"pytorch": row["latency_ms"]["onnxruntime"]}
        row["file_bytes"]["pt2"] = size
    assert verdict(report).startswith("The .pt2 file is 2.0x smaller (0.50 of the bytes) and 1.9x faster in PyTorch")


def test_targets_missed_are_said_with_the_miss():
    missed = {"what": "latency", "wanted": "0.5x", "got": "0.56x", "met": False}
    met = {"what": "drop", "wanted": "0.5 points", "got": "0.23 points", "met": True}
    assert verdict(made(targets=[missed, met])).endswith(
        "; the target for latency was MISSED by 0.06x (wanted 0.5x, got 0.56x)"
    )
    assert verdict(made(targets=[met])).endswith("; the target was met")
    assert verdict(made(targets=[met, met])).endswith("; both targets were met")
    assert verdict(made(targets=[met, met, met])).endswith("; all 3 targets were met")
    unknown = {"what": "memory", "wanted": "8 MiB", "got": None, "met": False}
    assert verdict(made(targets=[unknown])).endswith(
        "; the target for memory was MISSED (wanted 8 MiB, it was not measured)"
    )


@pytest.mark.parametrize(
    ("wanted", "got", "miss"),
    [
        ("0.5x", "0.56x", "0.06x"),
        ("3 ms", "3.4 ms", "0.4 ms"),
        (0.5, 0.75, "0.25"),
        ("at most 3 ms", "3.5 ms", "0.5 ms"),
        ("3 ms", "0.5x", None),
        ("small", "big", None),
    ],
)
def test_missed_by(wanted, got, miss):
    assert missed_by({"wanted": wanted, "got": got}) == miss


def test_only_the_original():
    report = made()
    report["rows"].pop()
    assert verdict(report) == (
        "The original as it is: 1000 B as .onnx, 950 B as .terse, 1.90 ms in ONNX Runtime, 91.73 % of 10,000 images, "
        "95 % interval 91.2-92.3"
    )


def test_a_measured_interval_decides_over_the_cautious_one():
    # 1.87 of 1.90 ms with 1 % spread each: the cautious interval reaches over 1, that of shared turns does not.
    assert "NOT faster" in verdict(made(time=1.87))
    assert "1.02x faster" in verdict(made(time=1.87, left_interval=[0.98, 0.99]))


def test_slower_needs_the_whole_interval_above_the_slack():
    assert Change(1.0, 1.03, 1.021, 1.04).grew
    assert not Change(1.0, 1.03, 1.019, 1.04).grew
    assert not Change(1.0, 0.97, 0.94, 1.0).shrank


def test_other_threads_or_batch_are_not_compared():
    report = made()
    report["rows"][1]["latency_ms"]["onnxruntime"]["threads"] = 2
    assert latency_change(report, report["rows"][1], "onnxruntime") is None
    assert "latency was not compared" in verdict(report)


def test_the_first_runtime_named_is_the_headline():
    report = made(settings={"runtime": "openvino,onnxruntime"})
    assert first_runtime(report) == "onnxruntime"  # nothing was measured in OpenVINO
    for row in report["rows"]:
        row["latency_ms"]["openvino"] = latency(1.0)
    assert first_runtime(report) == "openvino"
    assert "faster in OpenVINO" in verdict(report)


def test_the_examples_in_the_words():
    assert doctest.testmod(words).failed == 0
