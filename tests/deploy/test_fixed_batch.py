"""LiteRT, ExecuTorch and torch.compile: what they read gives the outputs of the model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tersenet.bricks.mask import attach, mask_of
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.executorch import export_executorch
from tersenet.deploy.litert import export_litert
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.runtimes import open_file
from tersenet.deploy.trailer import read_trailer, with_trailer
from tersenet.deploy.verify import verify
from tersenet.errors import ExportError
from tersenet.task import Preparation

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters and Inductor warn about their own insides
PREPARATION = Preparation((8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), tuple("abcdef"))
EXPORTERS = {
    "litert": (export_litert, "a.tflite", "litert_torch"),
    "executorch": (export_executorch, "a.pte", "executorch"),
}


@pytest.mark.minutes
@pytest.mark.parametrize("runtime", EXPORTERS)
def test_an_exported_file_gives_the_models_outputs(
    tiny_model: nn.Module, tmp_path: Path, runtime: str, capfd: pytest.CaptureFixture[str]
) -> None:
    exporter, name, package = EXPORTERS[runtime]
    pytest.importorskip(package)
    path = exporter(tiny_model, torch.zeros(2, 3, 8, 8), tmp_path / name, PREPARATION)
    runner = open_file(path)
    assert (runner.runtime, runner.input_shape) == (runtime, (2, 3, 8, 8))
    assert Preparation.of_metadata(runner.metadata) == PREPARATION
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    agreement = verify(runner, tiny_model, [x])
    assert agreement.max_abs_error < 1e-5
    assert agreement.samples == 5
    first = runner.run(x[:2].numpy())
    kept = first.copy()
    runner.run(x[2:4].numpy())
    np.testing.assert_array_equal(first, kept)  # two results do not share memory
    assert capfd.readouterr().out == ""
    # The .terse model, which is a graph without its class, is what `export` gives the exporters.
    terse = open_file(save_terse(tiny_model, torch.zeros(1, 3, 8, 8), tmp_path / "a.terse", PREPARATION))
    np.testing.assert_allclose(terse.run(x.numpy()), runner.run(x.numpy()), atol=1e-5)


@pytest.mark.minutes
@pytest.mark.parametrize("runtime", EXPORTERS)
def test_what_cannot_be_written_is_one_sentence(
    tiny_model: nn.Module, tmp_path: Path, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, name, package = EXPORTERS[runtime]
    pytest.importorskip(package)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator\nlong story")

    module = {"litert": "litert_torch.convert", "executorch": "executorch.exir.to_edge_transform_and_lower"}
    pytest.importorskip(module[runtime].rpartition(".")[0])
    monkeypatch.setattr(module[runtime], fail)
    with pytest.raises(ExportError, match=r"Sequential could not be written for .*: no such operator$"):
        exporter(tiny_model, torch.zeros(1, 3, 8, 8), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.minutes
@pytest.mark.parametrize("write", [export_pt2, save_terse])
def test_a_compiled_file_gives_the_models_outputs(tiny_model: nn.Module, tmp_path: Path, write: Callable) -> None:
    path = tmp_path / ("a.pt2" if write is export_pt2 else "a.terse")
    write(tiny_model, torch.zeros(1, 3, 8, 8), path)
    # In a process of its own: Inductor's caches and settings are the process's.
    code = (
        "import sys, json, numpy as np; from tersenet.deploy.runtimes import open_file\n"
        "r = open_file(sys.argv[1], 'pytorch-compiled'); x = np.ones((2, 3, 8, 8), np.float32)\n"
        "print(json.dumps([r.runtime, r.input_shape, r.run(x).tolist()]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    if "no C++ compiler" in done.stderr:
        pytest.skip("there is no C++ compiler here")
    assert done.returncode == 0, done.stderr
    runtime, shape, got = json.loads(done.stdout.splitlines()[-1])
    assert (runtime, shape) == ("pytorch-compiled", [None, 3, 8, 8])
    with torch.no_grad():
        np.testing.assert_allclose(got, tiny_model(torch.ones(2, 3, 8, 8)).numpy(), atol=1e-5)


def test_a_trailer_comes_back_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(with_trailer(b"content", PREPARATION))
    assert path.read_bytes().startswith(b"content")
    assert Preparation.of_metadata(read_trailer(path)) == PREPARATION
    for content in (with_trailer(b"content", PREPARATION)[:-3], b"content", b"", b"\ntersenet.metadata=[1]"):
        path.write_bytes(content)
        assert read_trailer(path) == {}
    assert with_trailer(b"content", None) == b"content"


@pytest.mark.minutes
@pytest.mark.parametrize("runtime", EXPORTERS)
def test_masks_are_zeros_in_the_file(tiny_model: nn.Module, tmp_path: Path, runtime: str) -> None:
    exporter, name, package = EXPORTERS[runtime]
    pytest.importorskip(package)
    model = copy.deepcopy(tiny_model)
    layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    attach(layer).mask[:, 0] = False
    runner = open_file(exporter(model, torch.zeros(2, 3, 8, 8), tmp_path / name, PREPARATION))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert verify(runner, model, [x]).max_abs_error < 1e-5
    assert verify(runner, tiny_model, [x]).max_abs_error > 1e-3
    assert mask_of(layer) is not None  # the model keeps its mask
