"""Weights stay coded until they are touched, layer by layer, and are the same then."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.codec import container
from tersenet.deploy.artifact import load_terse, save_terse, unpack
from tersenet.deploy.lazy import CodedTensors
from tersenet.errors import FileError


class Tied(nn.Module):
    """(N, 3, 8, 8) -> (N, 4); one layer twice, two layers with one weight, a bare parameter, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.conv.bias.requires_grad_(False)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.norm(self.conv(x * self.scale)))).mean((2, 3))
        return self.b(torch.relu(self.a(x)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_terse(Tied().eval(), torch.randn(2, 3, 8, 8), tmp_path / "m.terse")


def coded(model: nn.Module) -> set[str]:
    return {path for path, layer in model.named_modules() if isinstance(layer.__dict__["_parameters"], CodedTensors)}


def test_a_layer_is_decoded_when_it_is_touched(saved: Path) -> None:
    model = load_terse(saved, lazy=True)
    every = {"", "conv", "norm", "again", "a", "b"}
    assert coded(model) == every
    assert torch.equal(model.conv.weight, load_terse(saved).conv.weight)
    assert coded(model) == every - {"conv"}
    model.eval()
    assert coded(model) == every - {"conv"}
    assert type(model.conv.__dict__["_parameters"]) is type(nn.Linear(1, 1).__dict__["_parameters"])


TOUCHES: dict[str, Callable[[Any], Any]] = {
    "a forward": lambda model: model(torch.zeros(1, 3, 8, 8)),
    "its state dict": lambda model: model.state_dict(),
    "all parameters": lambda model: (list(model.parameters()), list(model.buffers())),
    "a move": lambda model: model.double(),
    "a copy": copy.deepcopy,
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES.keys())
def test_whatever_touches_all_decodes_all(touch: Callable[[Any], Any], saved: Path) -> None:
    model, plain = load_terse(saved, lazy=True), load_terse(saved)
    copied = touch(model)
    assert coded(model) == set()
    assert not isinstance(copied, nn.Module) or coded(copied) == set()
    state = plain.state_dict()
    assert all(torch.equal(value.float(), state[name].float()) for name, value in model.state_dict().items())


def test_it_computes_trains_and_exports_as_the_plain_one(saved: Path, tmp_path: Path) -> None:
    model, plain = load_terse(saved, lazy=True), load_terse(saved)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model(x), plain(x))
    assert model.a.weight is model.b.weight
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["conv.bias"]
    for each in (model, plain):
        each.train()
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.1)
        each(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    save_terse(load_terse(saved, lazy=True), x, tmp_path / "again.terse")
    again = load_terse(tmp_path / "again.terse").eval()
    assert torch.equal(again(x), load_terse(saved)(x))


def test_what_is_set_before_it_is_touched_stays(saved: Path) -> None:
    model = load_terse(saved, lazy=True)
    model.conv.weight = nn.Parameter(torch.ones(4, 3, 3, 3))
    del model.norm._buffers["num_batches_tracked"]
    assert torch.equal(model.conv.weight, torch.ones(4, 3, 3, 3))
    assert "num_batches_tracked" not in dict(model.norm.named_buffers())
    assert torch.equal(model.conv.bias, load_terse(saved).conv.bias)


def test_damage_within_a_tensor_is_said_when_it_is_touched(saved: Path) -> None:
    """The checksum of the whole was made to fit, as an attacker would."""
    data = bytearray(saved.read_bytes())
    contents = container.inspect(saved)
    data[contents.blobs[contents.names["again.weight"]].offset + 9] ^= 16
    data[-32:] = hashlib.sha256(data[:-32]).digest()
    saved.write_bytes(data)
    model = load_terse(saved, lazy=True)
    assert model.conv.weight.shape == (4, 3, 3, 3)
    for _ in range(2):
        with pytest.raises(FileError, match=r"at byte \d+"):
            _ = model.again.weight
    data[200] ^= 1
    saved.write_bytes(data)
    with pytest.raises(FileError, match="checksum"):
        load_terse(saved, lazy=True)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(saved: Path, threads: int) -> None:
    one = load_terse(saved).state_dict()
    assert all(torch.equal(value, one[name]) for name, value in load_terse(saved, threads=threads).state_dict().items())


def test_unpacking_to_onnx(saved: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    x = torch.randn(3, 3, 8, 8)
    path = unpack(saved, tmp_path / "m.onnx")
    found = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), load_terse(saved)(x), atol=1e-5)
