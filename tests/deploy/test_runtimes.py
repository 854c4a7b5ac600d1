from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from tersenet.deploy import runtimes
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.runner import Runner
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


class Several(nn.Module):
    """Token ids, a mask and features to a dict of outputs that stand in another order than they are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(300, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor, keep: torch.Tensor, x: torch.Tensor) -> dict:
        features = (self.embed(ids) * keep[..., None]).sum(1) + x
        return {"best": (self.linear(features) > 0, features), "logits": self.linear(features)}


SEVERAL = Several().eval()
IDS = np.array([[299, 1, 7], [0, 2, 298], [5, 6, 257]])
KEEP = np.array([[True, False, True], [True, True, True], [False, False, True]])


def several_onnx(path: Path, batch: int | None = None) -> Path:
    """A file by torch alone; the batch open or fixed."""
    inputs = (torch.from_numpy(IDS), torch.from_numpy(KEEP), torch.randn(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            SEVERAL, tuple(x[:batch] for x in inputs), path, dynamo=True, verbose=False,
            dynamic_shapes=None if batch else tuple({0: Dim.DYNAMIC} for _ in inputs),
        )  # fmt: skip
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "pytorch", "module"])
@pytest.mark.parametrize("batch", [None, 2])
def test_all_outputs_of_several_inputs_by_order(tmp_path, runtime, batch):
    inputs = (IDS, KEEP, X[:3, 0, 0, :4].astype(np.float64))
    if runtime == "module":
        runner = open_module(SEVERAL)
    elif runtime == "pytorch":
        given = (torch.from_numpy(IDS), torch.from_numpy(KEEP), torch.randn(3, 4))
        program = torch.export.export(SEVERAL, given, dynamic_shapes=tuple({0: Dim.DYNAMIC} for _ in given))
        torch.export.save(program, tmp_path / "several.pt2")
        runner = open_file(tmp_path / "several.pt2")
    else:
        pytest.importorskip(runtime)
        runner = open_file(several_onnx(tmp_path / "several.onnx", batch), runtime)
        assert [each.dtype for each in runner.inputs] == ["int64", "bool", "float32"]
    with torch.no_grad():
        made = SEVERAL(*(torch.from_numpy(x) for x in inputs[:2]), torch.from_numpy(inputs[2]).float())
    expected = [made["best"][0], made["best"][1], made["logits"]]
    got = runner.run_all(inputs)
    assert [each.dtype for each in got] == [np.float32] * 3
    for found, each in zip(got, expected, strict=True):
        np.testing.assert_allclose(found, each.float().numpy(), atol=1e-5)
    np.testing.assert_array_equal(runner.run(inputs), got[0])
    assert runner.outputs(inputs)[0].dtype == bool


def test_other_inputs_than_the_files_are_refused(tmp_path):
    runner = open_file(several_onnx(tmp_path / "several.onnx"))
    with pytest.raises(DataError, match=r"takes 3 inputs \(ids, keep, x\), got 2"):
        runner.run((IDS, KEEP))
    with pytest.raises(DataError, match=r"input 'x' of .* must be Nx4, got 3x5"):
        runner.run((IDS, KEEP, X[:3, 0, 0, :5]))
    with pytest.raises(DataError, match="input 'ids' takes int64, got numbers that are not whole"):
        runner.run((IDS + 0.5, KEEP, X[:3, 0, 0, :4]))


def test_an_output_that_is_not_per_sample_is_not_put_together_from_pieces():
    both = Runner("onnxruntime", None, (2, 4), lambda x: (x, x.sum(0)))
    assert [each.shape for each in both.run_all(np.ones((2, 4)))] == [(2, 4), (4,)]
    with pytest.raises(DataError, match="takes batches of 2 and has an output that is not one per sample"):
        both.run_all(np.ones((3, 4)))


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
