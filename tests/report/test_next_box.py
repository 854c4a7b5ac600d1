"""The Next box: the file that was measured best, lines that really run, what each step bought, and what to try."""

from __future__ import annotations

import copy
import html
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from cases import task_for, tiny
from tersenet.job import compress
from tersenet.numerics.scale import Scale
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.quantization.quantize import Quantize
from tersenet.recipe import Recipe
from tersenet.report.next_box import _WEAKER, advice, between, bought, deploy, fastest_runtime, stored
from tersenet.report.page import write_html
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm

RECIPE = Recipe((PruneChannels(sparsity=0.5), FoldBatchNorm(), Quantize()))


@pytest.fixture
def example():
    return json.loads((Path(__file__).parent / "example_report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    model = tiny()
    runtimes = ("onnxruntime", "openvino", "pytorch")
    return compress(model, task_for(model), RECIPE, out=tmp_path_factory.mktemp("next") / "run", runtimes=runtimes)


@pytest.mark.minutes
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "pytorch"])
@pytest.mark.parametrize("row", ["last", "before"])
def test_the_lines_run_on_the_files_of_a_run(run, monkeypatch, capsys, runtime, row):
    report = copy.deepcopy(run.report)
    for place, entry in enumerate(report["rows"]):
        # As if this runtime, and where asked for the first step, had been measured to be the fastest by far.
        times = entry["latency_ms"]
        times[runtime] |= {"median": 1e-4, "low": 1e-4, "high": 1e-4}
        if row == "before" and place == 1:
            times[runtime] |= {"median": 1e-5, "low": 1e-5, "high": 1e-5}
            entry["score"] = 1.0
    found = deploy(report)
    assert found is not None
    kind = "pt2" if runtime == "pytorch" else "onnx"
    assert found.file == (f"model.{kind}" if row == "last" else f"files/01-prune_channels.{kind}")
    assert found.runtime == runtime
    assert found.code is not None
    assert len(found.code.splitlines()) <= 5
    monkeypatch.chdir(run.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtimes' own deprecations are not what is tested
        names: dict[str, object] = {}
        exec(found.code, names)
    example = task_for(tiny()).example
    assert tuple(names["images"].shape[1:]) == tuple(example.shape[1:])  # type: ignore[attr-defined]
    assert torch.as_tensor(names["logits"]).shape[0] == 1
    assert capsys.readouterr().out.strip()


@pytest.mark.minutes
def test_the_page_and_the_card_have_the_same_lines(run, tmp_path):
    report = copy.deepcopy(run.report)
    report["rows"][-1]["latency_ms"]["onnxruntime"] |= {"median": 1e-4, "low": 1e-4, "high": 1e-4}
    found = deploy(report)
    assert found is not None
    assert (found.file, found.runtime) == ("model.onnx", "onnxruntime")
    assert found.code is not None
    write_html([report], tmp_path / "page.html")
    page = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert found.code in page
    assert found.code in (run.folder / "README.md").read_text(encoding="utf-8")


def test_the_file_that_was_measured_best_is_named(example):
    found = deploy(example)
    assert (found.file, found.runtime) == ("model.onnx", "openvino")
    assert found.why.startswith("0.402 ms (2.5x faster), 230.4 KiB (4.7x smaller), accuracy 91.48 %; OpenVINO is")
    assert "openvino.compile_model" in found.code
    # Not where that is not sure, and not where it had more threads.
    for more in ({"high": 0.45}, {"threads": 2}):
        kept = copy.deepcopy(example)
        kept["rows"][-1]["latency_ms"]["openvino"] |= more
        assert fastest_runtime(kept) == "onnxruntime"


def test_another_row_is_named_where_it_is_surely_faster_and_scores_no_less(example):
    train = example["rows"][3]
    train["step"] = "3. train"
    del example["rows"][-1]["latency_ms"]["openvino"]
    alone = deploy(example)
    assert (alone.file, alone.runtime) == ("model.onnx", "onnxruntime")
    assert alone.why == "0.447 ms (2.7x faster), 230.4 KiB (4.7x smaller), accuracy 91.50 %"
    train["latency_ms"]["onnxruntime"] |= {"median": 0.3, "low": 0.29, "high": 0.31}
    found = deploy(example)
    assert found.file == "files/03-train.onnx"
    assert "it is faster than the result and scores no less" in found.why
    train["score"] = example["rows"][-1]["score"] - 0.001
    assert deploy(example).file == "model.onnx"
    example["metric"] = Scale("MAE", "px", False).to_json()  # then less is better
    assert deploy(example).file == "files/03-train.onnx"
    train["latency_ms"]["onnxruntime"]["high"] = 0.46  # not surely
    assert deploy(example).file == "model.onnx"


def test_without_a_file_there_is_nothing_to_deploy():
    report = {"settings": {}, "files": {}, "rows": [{"step": "original"}]}
    assert deploy(report) is None
    assert advice(report) is None
    assert bought(report) == []


def test_what_each_step_bought_is_against_the_row_before(example):
    found = {each["step"]: each for each in bought(example)}
    assert list(found) == [row["step"] for row in example["rows"][1:]]
    quantize, train = found["quantize"], found["train"]
    rows = example["rows"]
    left = rows[4]["file_bytes"]["onnx"] / rows[3]["file_bytes"]["onnx"]
    assert quantize["bytes"] == (f"{1 / left:.1f}x smaller", "good")
    change = between(rows[3], rows[4], "onnxruntime")
    assert quantize["time"] == (f"{change.factor:.1f}x faster", "good")
    assert quantize["score"] == ("0.08 points lost", "bad")
    assert train["bytes"] == ("same size", "even")
    assert train["time"] == ("no sure change", "even")
    assert train["score"] == ("7.37 points gained", "good")
    example["metric"] = Scale("MAE", "px", False).to_json()
    assert bought(example)[2]["score"] == ("0.0737 px lost", "bad")


def test_what_to_try_follows_from_the_loss(example):
    example["settings"]["max_drop"] = None
    found = advice(example)
    assert found.aim == "more gain"  # its interval holds the original's score
    assert found.said[0] == "a tighter target in place of the recipe: --latency 0.19x (0.37x now)"
    example["rows"][-1] |= {"score": 0.85, "score_interval": [0.843, 0.857]}
    found = advice(example)
    assert found.aim == "less loss"
    assert found.said[0] == "quantize cost 6.58 points"
    assert any("rounding: repaired" in said for said in found.said)
    example["rows"][3] |= {"score": 0.86, "score_interval": [0.853, 0.867]}
    found = advice(example)
    assert found.said[0] == "prune_channels cost 5.73 points after its training"
    assert "prune less: sparsity: 0.22 in place of 0.375" in found.said
    assert "train longer: epochs: 12 in place of 6" in found.said


def test_what_was_allowed_decides_over_what_is_sure(example):
    for allowed, aim in ((0.5, "more gain"), (0.4, "less loss"), (None, "more gain")):  # 0.23 points lost, not surely
        example["settings"]["max_drop"] = allowed
        assert advice(example).aim == aim
    example["rows"][-1] |= {"score": 0.85, "score_interval": [0.843, 0.857]}
    for allowed, aim in ((20, "more gain"), (None, "less loss")):
        example["settings"]["max_drop"] = allowed
        assert advice(example).aim == aim
    example["rows"][-1]["score"] = example["rows"][0]["score"] + 0.01
    assert advice(example).aim == "more gain"


def test_a_target_is_loosened_or_tightened(example):
    example["settings"]["latency"] = "0.25x"
    assert "a tighter target: --latency 0.17x in place of 0.25x" in advice(example).said
    example["settings"]["max_drop"] = 0.1
    assert "a looser target: --latency 0.33x in place of 0.25x" in advice(example).said
    example["settings"]["latency"] = "3ms"
    assert any("rounding: repaired" in said or "prune less" in said for said in advice(example).said)


def test_what_the_run_did_not_do_is_to_be_tried_first(example):
    example["rows"] = example["rows"][:2]
    example["recipe"] = "schema: 1\nsteps:\n- fold_batch_norm: {}\n"
    said = advice(example).said
    assert any("quantize: {}" in each for each in said)
    assert any("--macs 0.5x" in each for each in said)


SETTINGS = {
    "prune_channels": {"sparsity": 0.5},
    "prune_weights": {"sparsity": 0.8, "refit": False},
    "prune_activations": {"sparsity": 0.6},
    "quantize": {"weights": "int4", "activations": None},
    "train": {"epochs": 2, "learning_rate": 0.01},
    "drop_blocks": {"count": 1},
    "share_weights": {"bits": 4},
    "shrink_file": {"price": 1e-7},
    "quantize_aware": {"weights": "int4"},
    "resize": {"sizes": ["160"]},
}


@pytest.mark.parametrize("name", sorted(_WEAKER))
def test_advice_names_settings_that_there_are(name):
    """Each setting that is advised in YAML is read as one of that step, beside those that it has."""
    for settings in (SETTINGS[name], *([{"macs": 0.5}] if name == "prune_channels" else [])):
        said = _WEAKER[name](settings)
        assert said
        for sentence in said:
            advised = sentence.partition(": ")[2].removeprefix("quantize: ")
            changed = {key: yaml.safe_load(value) for key, value in re.findall(r"([a-z_]+): ([\w.-]+)", advised)}
            Recipe.parse(yaml.safe_dump({"schema": 1, "steps": [{name: {**settings, **changed}}]}))
            assert all(settings.get(key) != value for key, value in changed.items())


def test_what_is_advised_of_a_recipe_is_a_recipe(example):
    example["settings"]["max_drop"] = None
    example["rows"][-1] |= {"score": 0.85, "score_interval": [0.843, 0.857]}
    said = [*advice(example).said, *advice(example | {"targets": [], "rows": example["rows"][:2]}).said]
    steps = [part for each in said for part in re.findall(r"- (\w+: \{.*?\})(?= and| at|$)", each)]
    assert len(steps) == 3  # train; fold_batch_norm and quantize
    for step in steps:
        Recipe.parse(f"schema: 1\nsteps:\n- {step}\n")


def test_the_small_file_is_for_storing(example):
    assert stored(example).startswith("To store or send it: model.terse, 164.5 KiB")
    example["rows"][-1]["file_bytes"]["terse"] = 10**9
    assert stored(example) is None
