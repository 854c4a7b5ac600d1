"""Models as .terse files: they load where their class does not exist, compute the same, train on and export."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.quantized import QuantizedConv2d, QuantizedLinear
from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.shortcut import PadShortcut
from tersenet.codec import container
from tersenet.deploy import graph_json
from tersenet.deploy.artifact import load_terse, save_terse, terse_preparation, unpack
from tersenet.errors import ExportError, FileError, SettingsError, TraceError
from tersenet.task import Preparation

PREPARATION = Preparation((8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ("cat", "dog", "größe"))


class Residual(nn.Module):
    """(N, 3, 8, 8) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 8, 3, 2, 1)
        self.shortcut = PadShortcut(2, 2, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head((self.down(x) + self.shortcut(x)).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    return save_terse(model, torch.randn(1, 3, 8, 8), tmp_path / "m.terse", PREPARATION, {"from": "a test"}, {"a": [1]})


def test_a_model_comes_back_bit_for_bit(model: nn.Module, saved: Path) -> None:
    loaded = load_terse(saved)
    assert not any(module.training for module in loaded.modules())
    assert loaded.input_shape == (None, 3, 8, 8)
    state = model.state_dict()
    assert set(loaded.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))


def test_saving_leaves_the_model_and_gives_the_same_bytes(model: nn.Module, saved: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    again = save_terse(
        model, torch.randn(2, 3, 8, 8), saved.with_name("n.terse"), PREPARATION, {"from": "a test"}, {"a": [1]}
    )
    assert again.read_bytes() == saved.read_bytes()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_else_a_file_says(saved: Path) -> None:
    assert terse_preparation(saved) == PREPARATION
    manifest = container.inspect(saved).manifest
    assert manifest["plan"] == {"a": [1]}
    assert manifest["provenance"]["from"] == "a test"
    assert manifest["outputs"] == [[None, 3]]


def test_without_a_preparation_the_size_comes_from_the_input(model: nn.Module, tmp_path: Path) -> None:
    path = save_terse(model, torch.randn(1, 3, 8, 8), tmp_path / "m.terse")
    found = terse_preparation(path)
    assert (found.size, found.channels) == ((8, 8), 3)


def test_it_loads_where_the_class_does_not_exist(model: nn.Module, saved: Path) -> None:
    x = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    code = (
        "import sys, torch; from tersenet.deploy.artifact import load_terse; "
        f"y = load_terse({str(saved)!r})(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)); "
        "assert not [m for m in sys.modules if 'test_artifact' in m]; print(y.tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=saved.parent)
    assert out.returncode == 0, out.stderr
    assert torch.allclose(torch.tensor(eval(out.stdout)), model(x), atol=1e-6)


def test_a_loaded_model_trains_and_is_saved_again(saved: Path) -> None:
    torch.manual_seed(0)
    loaded = load_terse(saved).train()
    optimizer = torch.optim.SGD(loaded.parameters(), 0.05)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(loaded(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    again = save_terse(loaded, x, saved.with_name("again.terse"))
    assert torch.equal(load_terse(again)(x), loaded.eval()(x))


def test_a_quantized_model_is_settled_and_small(model: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model.conv = nn.Sequential(Quantizer(), QuantizedConv2d.of(nn.Conv2d(3, 4, 3, padding=1)))
    model.head = nn.Sequential(Quantizer(), QuantizedLinear.of(model.head))
    for quantizer, layer in (model.conv, model.head):
        quantizer.scale.fill_(0.03)
        quantizer.zero_point.fill_(128)
        layer.input_scale.fill_(0.03)
        layer.weight_scale.copy_(layer.weight.detach().flatten(1).abs().amax(1) / 127)
    model.eval()
    x = torch.randn(4, 3, 8, 8)
    path = save_terse(model, x, tmp_path / "q.terse")
    loaded = load_terse(path)
    assert torch.allclose(loaded(x), model(x), atol=1e-5)
    assert loaded.state_dict()["conv.1.weight"].dtype == torch.int8
    assert type(model.conv[1]) is QuantizedConv2d  # the model itself was not settled


def test_unpack(model: nn.Module, saved: Path) -> None:
    from safetensors.torch import load_file

    x = torch.randn(3, 3, 8, 8)
    tensors = load_file(unpack(saved, saved.with_suffix(".safetensors")))
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    program = torch.export.load(unpack(saved, saved.with_suffix(".pt2"))).module()
    assert torch.allclose(program(x), model(x), atol=1e-6)
    with pytest.raises(SettingsError, match=r"\.pt2, \.onnx or \.safetensors"):
        unpack(saved, saved.with_suffix(".bin"))


class Forgetful(Residual):
    """Takes another number each time it is called, so a file cannot compute the same."""

    numbers = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(self.numbers)


def test_a_model_that_gives_other_outputs_each_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="other outputs when it is called again"):
        save_terse(Forgetful().eval(), torch.randn(2, 3, 8, 8), tmp_path / "m.terse")
    assert not list(tmp_path.iterdir())


def test_a_file_that_would_compute_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = graph_json.to_json

    def lying(graph: Any) -> dict[str, Any]:
        data = real(graph)
        changed = [node for node in data["nodes"] if node[1].startswith("aten.add")]
        assert changed
        for node in changed:
            node[1] = node[1].replace("aten.add", "aten.sub")
        return data

    monkeypatch.setattr(graph_json, "to_json", lying)
    with pytest.raises(ExportError, match="would differ"):
        save_terse(Residual().eval(), torch.randn(2, 3, 8, 8), tmp_path / "m.terse")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "other"},
        {"graph": None},
        {"graph": {}},
        {"input": {"shape": [None, 3, -8, 8], "dtype": "float32"}},
        {"input": {"shape": [1, 3, 8, 8], "dtype": "float32"}},
        {"input": {"shape": [None, 3, 8, 8], "dtype": []}},
        {"input": None},
    ],
)
def test_a_damaged_manifest_is_refused(changes: dict[str, object], saved: Path) -> None:
    manifest, tensors = container.read(saved)
    container.write(saved, {**manifest, **changes}, tensors)
    with pytest.raises(FileError, match=r"m\.terse cannot be used: at byte 28"):
        load_terse(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": [8]},
        {"mean": [0.1]},
        {"std": [0, 1, 1]},
        {"labels": [1]},
        {"size": "88"},
        {"more": 1},
        {"mean": ["a"] * 3},
    ],
)
def test_a_damaged_preparation_is_refused(changes: dict[str, object], saved: Path) -> None:
    manifest, tensors = container.read(saved)
    container.write(saved, {**manifest, "preparation": {**manifest["preparation"], **changes}}, tensors)
    with pytest.raises(FileError, match="at byte 28"):
        terse_preparation(saved)
