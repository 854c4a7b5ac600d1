from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.deploy import runtimes
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.runtimes import RUNTIMES, open_file, open_module, runtime_for
from tersenet.errors import DataError, FileError, MissingExtra, SettingsError
from tersenet.task import Preparation

X = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)


def expected(model: nn.Module, x: np.ndarray = X) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_onnx_file_gives_the_models_outputs_for_any_batch(tiny_model, tiny_onnx, runtime, threads):
    pytest.importorskip(runtime)
    runner = open_file(tiny_onnx, runtime, threads)
    assert (runner.runtime, runner.path, runner.threads) == (runtime, tiny_onnx, threads)
    assert runner.input_shape == (None, 3, 8, 8)
    assert runner.metadata["labels"] == "a b"
    for n in (1, 5):
        got = runner.run(X[:n])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected(tiny_model, X[:n]), atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_fixed_batch_is_served_in_pieces(tiny_model, fixed_onnx, runtime):
    pytest.importorskip(runtime)
    runner = open_file(fixed_onnx, runtime)
    assert runner.input_shape == (2, 3, 8, 8)
    np.testing.assert_allclose(runner.run(X), expected(tiny_model), atol=1e-5)


def test_two_results_of_one_runner_do_not_share_memory(tiny_onnx):
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
        runner = open_file(tiny_onnx, runtime)
        first = runner.run(X[:1])
        kept = first.copy()
        runner.run(X[1:2])
        np.testing.assert_array_equal(first, kept)


def test_openvinos_own_files_keep_the_metadata_and_need_their_weights(tiny_model, tiny_onnx, tmp_path):
    ov = pytest.importorskip("openvino")
    path = tmp_path / "tiny.xml"
    ov.save_model(ov.Core().read_model(tiny_onnx), path, compress_to_fp16=False)
    runner = open_file(path)
    assert runner.runtime == "openvino"
    assert runner.metadata == {"labels": "a b"}
    np.testing.assert_allclose(runner.run(X), expected(tiny_model), atol=1e-5)
    path.with_suffix(".bin").unlink()
    with pytest.raises(FileError, match=r"no tiny\.bin beside it"):
        open_file(path)


def test_openvino_computes_in_float32(tiny_onnx, monkeypatch):
    ov = pytest.importorskip("openvino")
    compiled = {}
    real = ov.Core.compile_model
    monkeypatch.setattr(ov.Core, "compile_model", lambda *args: compiled.setdefault("model", real(*args)))
    open_file(tiny_onnx, "openvino", threads=1)
    get = compiled["model"].get_property
    assert get("INFERENCE_PRECISION_HINT") == ov.Type.f32
    assert (get("INFERENCE_NUM_THREADS"), get("NUM_STREAMS"), get("ENABLE_CPU_PINNING")) == (1, 1, False)


def test_a_pt2_file_and_a_module_in_memory(tiny_model, tmp_path):
    path = export_pt2(tiny_model, torch.zeros(1, 3, 8, 8), tmp_path / "tiny.pt2", {"labels": "a b"})
    runner = open_file(path)
    assert (runner.runtime, runner.input_shape, runner.metadata) == ("pytorch", (None, 3, 8, 8), {"labels": "a b"})
    np.testing.assert_allclose(runner.run(X), expected(tiny_model), atol=1e-6)
    np.testing.assert_array_equal(open_module(tiny_model).run(X), expected(tiny_model))


def test_a_module_is_called_in_evaluation_mode_with_its_threads_and_put_back():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.get_num_threads(), torch.is_inference_mode_enabled()))
            return {"logits": x.double(), "other": x}

    model = nn.Sequential(Watch(), nn.Identity()).train()
    model[1].eval()
    model = nn.Sequential(model[0]).train()
    before = torch.get_num_threads()
    out = open_module(model, threads=before + 1).run(X)
    assert seen == [(False, before + 1, True)]
    assert out.dtype == np.float32
    assert torch.get_num_threads() == before
    assert all(module.training for module in model.modules())


def test_a_terse_file_runs_as_pytorch_and_says_how_its_inputs_are_prepared(tiny_model, tmp_path):
    preparation = Preparation((8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), tuple("abcdef"))
    path = save_terse(tiny_model, torch.zeros(2, 3, 8, 8), tmp_path / "tiny.terse", preparation)
    runner = open_file(path)
    assert (runner.runtime, runner.path, runner.input_shape) == ("pytorch", path, (None, 3, 8, 8))
    assert json.loads(runner.metadata["tersenet.std"]) == [0.4, 0.5, 0.6]
    assert json.loads(runner.metadata["tersenet.labels"]) == list("abcdef")
    np.testing.assert_allclose(runner.run(X), expected(tiny_model), atol=1e-6)


def test_a_module_of_other_inputs_than_images():
    x = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(open_module(nn.Flatten()).run(x), x)


def test_inputs_that_do_not_fit_are_refused(tiny_onnx):
    runner = open_file(tiny_onnx)
    for x in (X[:, :2], X[0], X[:0]):
        with pytest.raises(DataError, match="must be Nx3x8x8, got"):
            runner.run(x)


def test_wrong_use_says_what_is_allowed(tiny_onnx, tmp_path):
    with pytest.raises(SettingsError, match="'tensorrt'; the known ones are onnxruntime, openvino, pytorch"):
        open_file(tiny_onnx, "tensorrt")
    with pytest.raises(SettingsError, match=r"pytorch cannot read tiny.onnx; it reads \.pt2, \.terse"):
        open_file(tiny_onnx, "pytorch")
    with pytest.raises(SettingsError, match=r"no runtime reads cat\.jpg"):
        open_file("cat.jpg")
    with pytest.raises(FileError, match="there is no file"):
        open_file(tmp_path / "none.onnx")
    for threads in (0, 1.5, True):
        with pytest.raises(SettingsError, match="threads must be"):
            open_file(tiny_onnx, threads=threads)
    assert [runtime_for(f"a.{kind}") for kind in ("onnx", "XML", "pt2", "terse")] == [
        "onnxruntime", "openvino", "pytorch", "pytorch",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "runtime"), [
    ("a.onnx", "onnxruntime"), ("a.onnx", "openvino"), ("a.pt2", "pytorch"), ("a.pt2", "pytorch-compiled"),
    ("a.tflite", "litert"), ("a.pte", "executorch"),
])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x00" * 4096])
def test_a_damaged_file_is_one_sentence(tmp_path, name, runtime, content):
    if runtime in ("litert", "executorch"):
        pytest.importorskip(RUNTIMES[runtime].package)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        open_file(path, runtime)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_onnx_file_is_refused(tiny_onnx, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(tiny_onnx.read_bytes()[:-200])
    with pytest.raises(FileError, match=r"onnxruntime cannot open .*cut\.onnx"):
        open_file(path)


def test_a_missing_package_names_its_extra(tiny_onnx, tmp_path, monkeypatch):
    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for name in ("a.tflite", "a.pte"):
        (tmp_path / name).write_bytes(b"0")
    for path, runtime, extra in (
        (tiny_onnx, "onnxruntime", "onnx"),
        (tiny_onnx, "openvino", "openvino"),
        (tmp_path / "a.tflite", "litert", "litert"),
        (tmp_path / "a.pte", "executorch", "executorch"),
    ):
        with pytest.raises(MissingExtra, match=rf'pip install "tersenet\[{extra}\]"'):
            open_file(path, runtime)


def test_importing_loads_no_runtime():
    code = (
        "import sys, tersenet.deploy.runtimes as r; "
        "assert not {'torch', 'onnxruntime', 'openvino'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(RUNTIMES) == {"onnxruntime", "openvino", "pytorch", "pytorch-compiled", "litert", "executorch"}
    assert Path(runtimes.__file__).is_file()
