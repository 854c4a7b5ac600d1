"""report.json: the schema, its hand-written check against the jsonschema package, and the file."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest

from tersenet.errors import FileError
from tersenet.report.check import KEYWORDS, faults
from tersenet.report.report import new_report, read_json, row, schema, target, validate, write_json

EXAMPLE = Path(__file__).parent / "example_report.json"


@pytest.fixture
def example():
    return json.loads(EXAMPLE.read_text(encoding="utf-8"))


DESIGN = {
    "schema": 1,
    "machine": {},
    "settings": {},
    "rows": [
        {
            "step": "original",
            "score": 0.9339,
            "score_interval": [0.9289, 0.9386],
            "scores": {"pytorch": 0.9339, "onnxruntime": 0.9339},
            "top5": 0.9986,
            "samples": 10000,
            "params": 853018,
            "macs": 125485696,
            "flops": 250971392,
            "param_bytes": 3412072,
            "file_bytes": {"onnx": 3616431, "terse": 3300000},
            "latency_ms": {"onnxruntime": {"median": 2.63, "low": 2.60, "high": 2.70, "threads": 1, "batch": 1}},
        }
    ],
    "files": {"model.onnx": {"bytes": 1, "sha256": "0" * 64, "score": 0.9, "max_abs_error": 1e-6}},
    "verdict": "...",
}


# (where, value): each puts one wrong thing into the example; DELETE takes the key away.
class _Gone:
    def __repr__(self) -> str:
        return "gone"


DELETE = _Gone()
BROKEN = [
    (("schema",), 2),
    (("schema",), True),
    (("rows",), []),
    (("rows",), {}),
    (("verdict",), DELETE),
    (("machine",), DELETE),
    (("verdict",), ""),
    (("extra",), 1),
    (("rows", 0, "step"), DELETE),
    (("rows", 0, "step"), 3),
    (("rows", 0, "scroe"), 0.9),
    (("rows", 0, "score"), "0.9"),
    (("rows", 0, "score_interval"), [0.9]),
    (("rows", 0, "score_interval"), [0.9, 0.91, 0.92]),
    (("rows", 0, "top5"), 1.2),
    (("rows", 0, "params"), -1),
    (("rows", 0, "params"), 1.5),
    (("rows", 0, "macs"), True),
    (("rows", 0, "file_bytes", "onnx"), "big"),
    (("rows", 0, "latency_ms", "onnxruntime", "median"), DELETE),
    (("rows", 0, "latency_ms", "onnxruntime", "mean"), 1.0),
    (("rows", 0, "layers", 0, "path"), DELETE),
    (("rows", 0, "notes"), [1]),
    (("files", "model.onnx", "sha256"), "abc"),
    (("files", "model.onnx", "bytes"), None),
    (("targets", 0, "met"), "yes"),
    (("targets", 0, "met"), DELETE),
    (("metric",), {"name": "mAP"}),
    (("metric",), {"name": "", "unit": "%", "higher_is_better": True}),
    (("metric",), {"name": "mAP", "unit": None, "higher_is_better": True}),
    (("metric",), {"name": "mAP", "unit": "%", "higher_is_better": "yes"}),
    (("brief_recipe",), {}),
    (("preparation", "size"), [32]),
    (("preparation", "size", 0), 0),
    (("commands",), "tersenet"),
]


def broken(report, where, value):
    report = copy.deepcopy(report)
    place = report
    for key in where[:-1]:
        place = place[key]
    if value is DELETE:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    return report


def test_the_schema_is_valid_and_uses_only_what_the_check_reads():
    jsonschema.Draft202012Validator.check_schema(schema())

    def keywords(node):
        found = set(node)
        for name in ("properties", "$defs"):
            for inner in node.get(name, {}).values():
                found |= keywords(inner)
        for name in ("items", "additionalProperties"):
            if isinstance(node.get(name), dict):
                found |= keywords(node[name])
        return found

    assert keywords(schema()) <= KEYWORDS


@pytest.mark.parametrize("report", [DESIGN, json.loads(EXAMPLE.read_text(encoding="utf-8"))], ids=["design", "example"])
def test_good_reports_pass_both_checks(report):
    jsonschema.Draft202012Validator(schema()).validate(report)
    validate(report)


@pytest.mark.parametrize(("where", "value"), BROKEN, ids=lambda value: str(value)[:40])
def test_broken_reports_fail_both_checks(example, where, value):
    report = broken(example, where, value)
    assert not jsonschema.Draft202012Validator(schema()).is_valid(report)
    assert faults(report, schema(), schema())
    with pytest.raises(FileError, match="this is no report of schema 1"):
        validate(report)


def test_the_message_names_the_place_the_value_and_what_is_allowed(example):
    with pytest.raises(FileError, match=r"report\.rows\[0\]\.params is -1 and must be at least 0"):
        validate(broken(example, ("rows", 0, "params"), -1))
    with pytest.raises(FileError, match=r"unknown key 'scroe' \(known: step, score"):
        validate(broken(example, ("rows", 0, "scroe"), 1))


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("rows", 0, "flops"), 7, "must be 2 x macs"),
        (("rows", 0, "score"), 0.5, "must lie in score_interval"),
        (("rows", 1, "latency_ms", "onnxruntime", "low"), 99.0, "median is"),
        (("rows", 0, "score"), float("nan"), "must be of type number or null"),
        (("rows", 0, "seconds"), float("inf"), "must be of type number"),
    ],
)
def test_numbers_that_cannot_be_are_refused(example, where, value, said):
    with pytest.raises(FileError, match=said):
        validate(broken(example, where, value))


def test_the_last_digit_of_an_interval_is_no_fault():
    report = copy.deepcopy(DESIGN)
    report["rows"][0] |= {"score": 1.0, "score_interval": [0.99, 1.0 - 1e-16]}
    validate(report)


def test_a_row_leaves_out_what_is_not_known_and_counts_flops():
    made = row("train", macs=10, latency_ms={"onnxruntime": {"median": 1.0, "low": 1.0, "high": 1.0}})
    assert made == {
        "step": "train",
        "macs": 10,
        "flops": 20,
        "latency_ms": {"onnxruntime": {"median": 1.0, "low": 1.0, "high": 1.0}},
    }


def test_new_report_takes_tuples_and_writes_its_verdict():
    report = new_report(
        machine={"cores": 2},
        settings={"runtime": ("onnxruntime",)},
        rows=[row("original", file_bytes={"onnx": 400}), row("quantize", file_bytes={"onnx": 100})],
        targets=[target("bytes", "0.5x", "0.25x", True)],
    )
    jsonschema.Draft202012Validator(schema()).validate(report)
    assert report["verdict"].startswith("The .onnx file is 4.0x smaller (0.25 of the bytes) than the original's")
    assert report["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}


def test_write_and_read_give_the_same_report(example, tmp_path):
    write_json(example, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == example
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_broken_report_is_not_written_and_the_old_one_stays(example, tmp_path):
    path = tmp_path / "report.json"
    write_json(example, path)
    with pytest.raises(FileError):
        write_json(broken(example, ("rows",), []), path)
    assert read_json(path) == example


@pytest.mark.parametrize("text", ["", '{"schema": 1', "[]", '{"schema": 1}', "\x00\x01"])
def test_damaged_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=r"report\.json"):
        read_json(path)
    with pytest.raises(FileError, match="cannot be read"):
        read_json(tmp_path / "missing.json")
