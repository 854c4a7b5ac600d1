"""int8 models in LiteRT, ExecuTorch and torch.compile: integer kernels, and the outputs of the simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import TASK, Mobile, Residual, X, lively
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.decomposed import EXECUTORCH, INDUCTOR, LITERT, Dialect, decomposed, rounds_activations
from tersenet.deploy.executorch import export_executorch
from tersenet.deploy.left_in_float import integer_operators, left_in_float
from tersenet.deploy.litert import export_litert
from tersenet.deploy.runtimes import open_file
from tersenet.errors import SettingsError
from tersenet.quantization.quantize import Quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters warn about their own insides
EXPORTERS = {
    "litert": (export_litert, "model.tflite", "litert_torch"),
    "executorch": (export_executorch, "model.pte", "executorch"),
}


def quantized(make: type[nn.Module]) -> nn.Module:
    model, _ = Quantize().run(lively(make()), TASK)
    return model.eval()


def last_step(model: nn.Module) -> float:
    """What one step of the last rounding in every value can do to an output: ties that fall the other way."""
    last = [module for module in model.modules() if isinstance(module, Quantizer)][-1]
    final = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    return float(last.scale) * float(final.weight.detach().abs().sum(dim=1).max())


@pytest.mark.parametrize("make", [Residual, Mobile])
@pytest.mark.parametrize("dialect", [LITERT, EXECUTORCH, INDUCTOR], ids=["litert", "executorch", "inductor"])
def test_the_decomposed_model_is_the_same_function(make: type[nn.Module], dialect: Dialect) -> None:
    model = quantized(make)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = decomposed(model, X[:2], dialect)
    assert not any(isinstance(module, Quantizer) for module in graph.modules())
    with torch.no_grad():
        # Their rounding multiplies by 1 / scale where ours divides by scale, so that a tie may fall the other way.
        assert float((graph(X) - model(X)).abs().max()) <= last_step(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.minutes
@pytest.mark.parametrize("make", [Residual, Mobile])
@pytest.mark.parametrize("runtime", EXPORTERS)
def test_int8_models_run_in_integers(make: type[nn.Module], runtime: str, tmp_path: Path) -> None:
    exporter, name, package = EXPORTERS[runtime]
    pytest.importorskip(package)
    model = quantized(make)
    path = exporter(model, X[:1], tmp_path / name)
    runner = open_file(path)
    assert (runner.runtime, runner.input_shape) == (runtime, (1, 3, 8, 8))
    # LiteRT's average pooling rounds to the grid of its input first, and then to that of its result.
    steps = 2 if (make, runtime) == (Mobile, "litert") else 1
    with torch.no_grad():
        assert float(np.abs(runner.run(X.numpy()) - model(X).numpy()).max()) <= steps * last_step(model)
    # XNNPACK has no average pooling of windows in integers.
    pooled = [each for each in left_in_float(path, runtime) if runtime == "executorch" and "AvgPool" in each]
    assert left_in_float(path, runtime) == pooled
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert integer_operators(path, runtime) >= convolutions
    float_path = exporter(lively(make()), X[:1], tmp_path / f"float_{name}")
    assert integer_operators(float_path, runtime) == 0


class Odd(nn.Module):
    """An operator without an integer kernel between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.adaptive_avg_pool2d(self.second(torch.sin(self.first(x))), 1).flatten(1))


@pytest.mark.minutes
@pytest.mark.parametrize("runtime", EXPORTERS)
def test_what_runs_in_float_is_named(runtime: str, tmp_path: Path) -> None:
    exporter, name, package = EXPORTERS[runtime]
    pytest.importorskip(package)
    model = quantized(Odd)
    path = exporter(model, X[:1], tmp_path / name)
    assert any("sin" in each.lower() for each in left_in_float(path, runtime))
    with torch.no_grad():
        assert float(np.abs(open_file(path).run(X.numpy()) - model(X).numpy()).max()) <= last_step(model)


@pytest.mark.minutes
def test_float16_weights_halve_a_tflite_file(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 8)).eval()
    paths = [export_litert(model, X[:1], tmp_path / f"{half}.tflite", half=half) for half in (False, True)]
    whole, half = (path.stat().st_size for path in paths)
    assert half < 0.6 * whole
    with torch.no_grad():
        expected = model(X).numpy()
    got = open_file(paths[1]).run(X.numpy())
    assert 0 < np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()
    with pytest.raises(SettingsError, match="use litert"):
        export_litert(quantized(Residual), X[:1], tmp_path / "no.tflite", half=True)


@pytest.mark.minutes
def test_torch_compile_takes_integer_kernels(tmp_path: Path) -> None:
    model = quantized(Residual)
    path = save_terse(model, X[:2], tmp_path / "model.terse")
    np.save(tmp_path / "x.npy", X.numpy())
    # In a process of its own: Inductor's caches and settings are the process's.
    code = (
        "import sys, json, numpy as np, torch\n"
        "from torch._inductor.utils import run_and_get_code\n"
        "from tersenet.deploy.runtimes import open_file\n"
        "x = np.load(sys.argv[2]); runner = open_file(sys.argv[1], 'pytorch-compiled')\n"
        "out, sources = run_and_get_code(runner.run, x)\n"
        "print(json.dumps([sum(s.count('onednn.qconv') for s in sources), runner.run(x).tolist(), out.tolist()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "x.npy")], capture_output=True, text=True, check=False
    )
    if "no C++ compiler" in done.stderr:
        pytest.skip("there is no C++ compiler here")
    assert done.returncode == 0, done.stderr
    kernels, got, first = json.loads(done.stdout.splitlines()[-1])
    if torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported():
        assert kernels >= 3  # one for each convolution
    assert got == first
    with torch.no_grad():
        assert float(np.abs(np.array(got) - model(X).numpy()).max()) <= last_step(model)


def test_whether_activations_are_rounded() -> None:
    weights_only, _ = Quantize(activations=None).run(lively(Residual()), TASK)
    assert not rounds_activations(weights_only)
    assert not rounds_activations(lively(Residual()))
    assert rounds_activations(quantized(Residual))


@pytest.mark.minutes
@pytest.mark.parametrize("runtime", EXPORTERS)
def test_weights_of_few_bits_become_floats(runtime: str, tmp_path: Path) -> None:
    exporter, name, package = EXPORTERS[runtime]
    pytest.importorskip(package)
    model, _ = Quantize(weights="int4", activations=None).run(lively(Residual()), TASK)
    path = exporter(model, X[:1], tmp_path / name)
    with torch.no_grad():
        np.testing.assert_allclose(open_file(path).run(X.numpy()), model(X).numpy(), rtol=1e-4, atol=1e-4)
