"""What is done with the files of a finished run: measured, exported, packed, asked for labels."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from command import DigitsRun
from tersenet import files, models
from tersenet.deploy.artifact import load_terse, unpack
from tersenet.deploy.runtimes import open_file
from tersenet.errors import DataError, ExportError, FileError, InputWarning, SettingsError
from tersenet.gate import gate
from tersenet.models.weights import load_weights
from tersenet.predict import predict_images
from tersenet.preparations import preparation_of
from tersenet.sources import open_model

pytestmark = pytest.mark.minutes


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*") if path.is_file()}


@pytest.fixture
def run(digits_run: DigitsRun, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return shutil.copytree(digits_run.folder, tmp_path / "run")


def test_export_beside_a_run_keeps_what_its_report_describes(run: Path) -> None:
    before = checksums(run)
    found = files.export_to(run, ["onnx", "openvino", "torch"])
    assert [Path(path).name for path in found] == ["model.onnx", "model.xml", "model.pt2"]
    after = checksums(run)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"model.xml", "model.bin"}
    assert found[str(run / "model.xml")]["bytes"] == sum(
        (run / f"model.{end}").stat().st_size for end in ("xml", "bin")
    )
    # int8 arithmetic is rounded differently by OpenVINO; the others are PyTorch's.
    for path, entry in found.items():
        assert entry["max_abs_error"] < (0.05 if path.endswith(".xml") else 1e-4)


def test_export_says_that_a_file_of_the_run_is_wrong_and_leaves_it(run: Path) -> None:
    path = run / "model.onnx"
    onnx_model = onnx.load(path)
    step = next(each for each in onnx_model.graph.initializer if "scale" in each.name)
    step.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(step), step.name))
    onnx.save(onnx_model, path)
    before = checksums(run)
    with pytest.raises(ExportError, match=r"model\.onnx in onnxruntime"):
        files.export_to(run, ["onnx"])
    assert checksums(run) == before
    path.unlink()
    files.export_to(run, ["onnx"])
    assert path.is_file()


def test_export_writes_what_was_named_and_no_more(run: Path, tmp_path: Path) -> None:
    found = files.export_to(run / "model.terse", ["openvino"], tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["model.bin", "model.xml"]
    # What it says about its inputs survives, so that it can be scored by itself.
    (path,) = found
    assert preparation_of(open_file(path)).labels == tuple("0123456789")
    with pytest.raises(SettingsError, match="--to is npu, tpu; allowed: onnx, openvino, tensorrt, torch, terse, "):
        files.export_to(run, ["tpu", "onnx", "npu"], tmp_path)


@pytest.mark.filterwarnings("ignore")  # the exporters warn about their own insides
@pytest.mark.parametrize(("target", "package"), [("litert", "litert_torch"), ("executorch", "executorch")])
def test_an_int8_run_is_exported_with_a_fixed_batch_of_one(
    run: Path, tmp_path: Path, target: str, package: str
) -> None:
    pytest.importorskip(package)
    ((path, entry),) = files.export_to(run, [target], tmp_path).items()
    assert entry["max_abs_error"] < 0.05  # ties in rounding
    assert entry["left_in_float"] == []
    runner = open_file(path)
    assert runner.input_shape == (1, 1, 8, 8)
    assert preparation_of(runner).labels == tuple("0123456789")


def test_a_file_for_tensorrt_is_held_to_its_rules_and_its_own_simulation(run: Path, tmp_path: Path) -> None:
    ((path, entry),) = files.export_to(run, ["tensorrt"], tmp_path).items()
    assert Path(path).name == "model.tensorrt.onnx"
    assert entry["max_abs_error"] < 0.05
    assert entry["left_in_float"] == []


def test_an_exported_program_is_plain_pytorch(run: Path, tmp_path: Path) -> None:
    files.export_to(run, ["torch"], tmp_path)
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(program(x), load_terse(run / "model.terse")(x), rtol=0, atol=1e-5)


def test_pack_a_run_and_a_model(run: Path, digits_run: DigitsRun, tmp_path: Path) -> None:
    packed = files.pack(str(run), tmp_path / "run.terse")
    assert packed["bytes"] == (tmp_path / "run.terse").stat().st_size == (run / "model.terse").stat().st_size
    assert packed["ratio"] == packed["float32_bytes"] / packed["bytes"] > 3  # int8 in place of float32
    whole = files.pack("digits", tmp_path / "whole.terse", digits_run.weights)
    plain = models.build("digits").eval()
    load_weights(plain, digits_run.weights)
    assert whole["float32_bytes"] == 4 * sum(value.numel() for value in plain.parameters())
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load_terse(tmp_path / "whole.terse")(x), plain(x), rtol=0, atol=1e-5)
    with pytest.raises(SettingsError, match=r"must end in \.terse"):
        files.pack("digits", tmp_path / "whole.zip")


def test_an_unpacked_program_says_how_its_inputs_are_prepared(run: Path, tmp_path: Path) -> None:
    unpack(run / "model.terse", tmp_path / "u.pt2")
    assert preparation_of(open_file(tmp_path / "u.pt2")) == preparation_of(open_file(run / "model.onnx"))


def test_scores_are_those_of_the_report(run: Path, digits_run: DigitsRun) -> None:
    last = digits_run.ended.json["rows"][-1]
    found = files.measure_files([run / "model.onnx", run / "model.terse"], None, "digits", quiet=True)
    onnx, terse = found["files"].values()
    assert onnx["scores"] == {"onnxruntime": last["scores"]["onnxruntime"]}
    assert terse["scores"] == {"pytorch": last["scores"]["pytorch"]}
    assert onnx["samples"] == last["samples"]
    assert onnx["score_interval"] == last["score_interval"]
    assert found["ratios"] == []  # a ratio between runtimes says nothing about the files


def test_files_that_do_not_know_their_inputs_are_not_scored(run: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(run / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    assert files.measure_files([tmp_path / "bare.onnx"], quiet=True)["files"]
    with pytest.warns(InputWarning, match="nothing says how the model's inputs are prepared"):
        files.measure_files([tmp_path / "bare.onnx"], None, "digits", quiet=True)
    with pytest.raises(SettingsError, match="no labelled test part"):
        files.measure_files([run / "model.onnx"], None, "random:1x8x8", quiet=True)


def test_a_runtime_in_which_a_file_was_not_checked_is_said(run: Path) -> None:
    pytest.importorskip("openvino")
    known = open_file(run / "model.onnx", "openvino").metadata["tersenet.checked"]
    assert known == "onnxruntime"
    with pytest.warns(InputWarning, match="was checked in ONNX Runtime alone: what it computes in OpenVINO may differ"):
        files.measure_files([run / "model.onnx"], ["openvino"], quiet=True)
    assert "OpenVINO" not in (run / "README.md").read_text().split("## How to load it")[1].split("##")[0]


def test_a_file_is_measured_by_the_gate(run: Path) -> None:
    assert gate(run / "model.onnx", max_latency="1000ms")["met"]
    found = gate(run / "model.terse", max_latency="0.000001ms")
    assert not found["met"]
    assert found["targets"][0]["what"] == "ms in pytorch"


def test_labels_are_those_of_the_model_in_memory(run: Path, digit_images: list[Path]) -> None:
    model, preparation = open_model(str(run / "model.terse"))
    found = predict_images(run / "model.onnx", digit_images, top=10)
    for path in digit_images:
        image = pytest.importorskip("PIL.Image").open(path)
        x = (np.asarray(image, np.float32)[None, None] / 255 - preparation.mean[0]) / preparation.std[0]
        with torch.no_grad():
            shares = torch.softmax(model(torch.from_numpy(x.astype(np.float32))), dim=-1)[0]
        guesses = found[str(path)]
        assert sum(guess["probability"] for guess in guesses) == pytest.approx(1)
        probabilities = [guess["probability"] for guess in guesses]
        assert probabilities == pytest.approx(sorted(shares.tolist(), reverse=True), abs=1e-3)
        assert guesses[0]["label"] == str(int(shares.argmax())) == str(guesses[0]["index"])


def test_images_that_cannot_be_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.png").write_bytes(b"this is no image")
    with pytest.raises(DataError, match=r"^[^:]*junk\.png cannot be read: it is no image"):
        predict_images(run / "model.onnx", [tmp_path / "junk.png"])
    with pytest.raises(DataError, match="there is no such file"):
        predict_images(run / "model.onnx", [tmp_path / "none.png"])
    with pytest.raises(FileError, match="there is no file"):
        predict_images(tmp_path / "none.onnx", [tmp_path / "junk.png"])
