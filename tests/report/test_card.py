"""The model card: what it says, and that its five lines really load and run each file."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tersenet.errors import FileError
from tersenet.report.card import write_card


def load_example():
    return json.loads((Path(__file__).parent / "example_report.json").read_text(encoding="utf-8"))


def card(report, folder):
    write_card(report, folder / "README.md")
    return (folder / "README.md").read_text(encoding="utf-8")


def snippets(text):
    """Heading -> code of each Python block."""
    return dict(re.findall(r"\n([^\n]+):\n\n```python\n(.*?)\n```", text, re.DOTALL))


def test_it_says_what_matters(tmp_path):
    report = load_example()
    text = card(report, tmp_path)
    assert report["verdict"].split("(")[0] in text
    for wanted in (
        "91.50 %",
        "90.9-92.0",
        "10,000",
        "(N, 3, 32, 32)",
        "mean: 0.4914",
        "std: 0.247",
        "0 airplane, 1 automobile",
    ):
        assert wanted in text
    for file in report["files"].values():
        assert file["sha256"] in text
    assert "It was not tested on other data" in text
    assert "Example CPU at 2.4 GHz, 2 cores" in text
    assert all(len(code.splitlines()) == 5 for code in snippets(text).values())
    assert len(snippets(text)) == 4  # ONNX Runtime, OpenVINO, tersenet, plain PyTorch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with a tiny .onnx made by hand and a tiny .pt2."""
    onnx = pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("run")
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Flatten", ["image"], ["logits"])],
        "tiny",
        [tensor("image", onnx.TensorProto.FLOAT, ["N", 3, 32, 32])],
        [tensor("logits", onnx.TensorProto.FLOAT, ["N", 3072])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path / "model.onnx")
    example = torch.zeros(2, 3, 32, 32)
    batch = {"input": {0: torch.export.Dim("N", min=1)}}
    torch.export.save(torch.export.export(nn.Flatten().eval(), (example,), dynamic_shapes=batch), path / "model.pt2")
    return path


@pytest.mark.parametrize(
    ("head", "package"),
    [
        ("ONNX Runtime (`model.onnx`)", "onnxruntime"),
        ("OpenVINO (`model.onnx`)", "openvino"),
        ("Plain PyTorch, without tersenet (`model.pt2`)", "torch"),
    ],
)
def test_the_five_lines_run(folder, monkeypatch, capsys, head, package):
    pytest.importorskip(package)
    monkeypatch.chdir(folder)
    code = snippets(card(load_example(), folder))[head]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtimes' own deprecations are not what is tested
        exec(code, {})
    assert "0" in capsys.readouterr().out  # the largest of equal logits is the first


def test_a_file_is_shown_in_the_runtimes_that_it_was_checked_in(tmp_path):
    report = load_example()
    report["files"]["model.onnx"]["checked"] = ["onnxruntime"]
    heads = snippets(card(report, tmp_path))
    assert "ONNX Runtime (`model.onnx`)" in heads
    assert not any("OpenVINO" in head for head in heads)


def test_a_card_with_almost_nothing(tmp_path):
    report = {"schema": 1, "machine": {}, "settings": {}, "files": {}, "verdict": "Nothing"}
    text = card(report | {"rows": [{"step": "original"}]}, tmp_path)
    assert "No score was measured" in text
    assert "None" not in text


def test_nothing_from_a_report_breaks_the_markdown(tmp_path):
    report = load_example()
    nasty = "a | b\n# <script>alert(1)</script> `x` [y](z)"
    report["settings"]["model"] = report["warnings"][0] = report["verdict"] = nasty
    report["preparation"]["labels"] = [nasty]
    report["targets"][0]["what"] = nasty
    text = card(report, tmp_path)
    assert "<script" not in text.replace("`a | b # <script>alert(1)</script> 'x' [y](z)`", "")
    assert not re.search(r"^# <", text, re.MULTILINE)


def test_only_a_classifier_gives_a_number_per_class(tmp_path):
    report = load_example()
    assert "one number per class" in card(report, tmp_path)
    assert "| | Accuracy |" in card(report, tmp_path)
    report["metric"] = {"name": "mIoU", "unit": "%", "higher_is_better": True}
    text = card(report, tmp_path)
    assert "one number per class" not in text
    assert "argmax" not in text
    assert "| | mIoU |" in text


def test_many_labels_are_cut_and_said(tmp_path):
    report = load_example()
    report["preparation"]["labels"] = [f"class{i}" for i in range(1000)]
    assert "the first 40 of 1000" in card(report, tmp_path)


def test_a_report_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileError, match="this is no report"):
        write_card({"schema": 1}, tmp_path / "README.md")
    assert not list(tmp_path.iterdir())
