"""The verdict says good and bad news in plain words; the comparisons under it are checked by hand."""

from __future__ import annotations

import doctest

import pytest

from tersenet.numerics.intervals import wilson
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
    """A report of two rows: an original of 1000 bytes, 1.9 ms and 91.73 %, and what became of it."""

    def row(step, hits, sizes, times):
        score = (
            {}
            if hits is None
            else {"score": hits / 10000, "score_interval": list(wilson(hits, 10000)), "samples": 10000}
        )
        return {"step": step, **score, "file_bytes": sizes, "latency_ms": times}

    first = row("original", None if hits is None else 9173, {"onnx": 1000, "terse": 950}, {"onnxruntime": latency(1.9)})
    last = row(
        "quantize", hits, {"onnx": 600, "terse": size}, {} if time is None else {"onnxruntime": latency(time, **more)}
    )
    return {"settings": settings or {}, "rows": [first, last], "targets": list(targets)}


def test_the_sentence_of_the_design():
    assert verdict(made(size=476)) == (
        "2.1x smaller (0.48 of the bytes) and 1.9x faster in ONNX Runtime (0.53 of the time) than the original float "
        "file, at 0.23 points of accuracy lost (91.50 % of 10,000 images, 95 % interval 90.9-92.0, "
        "which holds the original's 91.73 %)"
    )


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (made(time=1.9), "2.0x smaller (0.50 of the bytes) but NOT faster in ONNX Runtime (1.00 of the time)"),
        (made(time=1.88), "NOT faster in ONNX Runtime (0.99 of the time)"),
        (made(time=3.04), "2.0x smaller (0.50 of the bytes) but 1.6x SLOWER in ONNX Runtime (1.60 of the time)"),
        (made(size=1000), "Not smaller (1.00 of the bytes) but 1.9x faster"),
        (made(size=1300, time=3.04), "1.3x LARGER (1.30 of the bytes) and 1.6x SLOWER"),
        (made(time=None), "than the original float file (latency was not compared)"),
        (
            made(hits=8900),
            "at 2.73 points of accuracy lost (89.00 % of 10,000 images, 95 % interval 88.4-89.6, which lies below",
        ),
        (made(hits=9200), "with 0.27 points of accuracy gained (92.00 % of 10,000 images"),
        (made(hits=9173), "with no accuracy lost (91.73 %"),
        (made(hits=None), "with no score measured"),
        (made(settings={"metric": "mean IoU"}), "0.23 points of mean IoU lost"),
        (made(settings={"samples_are": "digits"}), "of 10,000 digits"),
    ],
)
def test_wording(report, said):
    assert said in verdict(report)


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
        "The original as it is: 950 B as .terse, 1.90 ms in ONNX Runtime, 91.73 % of 10,000 images, "
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
