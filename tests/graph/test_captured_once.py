"""A forward is captured once for all models of the same structure, and anew for any other."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.pt2 import export_pt2, read_pt2
from tersenet.graph import capture
from tersenet.graph.trace import trace

FACTOR = 2.0


class Settings:
    def __init__(self) -> None:
        self.slope = 0.1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.ones(4, 1, 1), persistent=False)
        self.power, self.many, self.settings, self.kept = 2, [1, 2], Settings(), torch.ones(1)
        self.register_buffer("both", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)) ** self.power + self.shift * self.many[1]
        y = nn.functional.leaky_relu(self.second(y), self.settings.slope) * FACTOR
        return y + self.kept


def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that torch.export captured."""
    monkeypatch.setattr(capture, "_known", type(capture._known)())
    made: list[Any] = []
    real = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: made.append(args[0]) or real(*args, **kwargs))
    return made


def right(model: nn.Module) -> None:
    torch.testing.assert_close(trace(model, x()).eval()(x()), model(x()))


def test_a_copy_with_other_numbers_is_not_captured_again(count: list[Any]) -> None:
    first = Net().eval()
    right(first)
    first.norm.weight.data.mul_(3)
    first.shift.mul_(2)
    right(first)
    other = copy.deepcopy(first)
    other.kept = first.kept  # a tensor outside of parameters and buffers stands for itself
    nn.init.normal_(other.first.weight)
    other.shift.mul_(5)
    right(other)
    graph = trace(other, x())
    assert len(count) == 1
    assert graph.first is other.first
    assert graph.norm is other.norm


def change_power(model: Any) -> None:
    model.power = 3


def change_a_list(model: Any) -> None:
    model.many[1] = 5


def change_settings(model: Any) -> None:
    model.settings.slope = 0.3


def change_a_constant(model: Any) -> None:
    model.kept.add_(1)


def change_a_global(model: Any) -> None:
    globals()["FACTOR"] = 4.0


def share_a_layer(model: Any) -> None:
    model.second.weight = nn.Parameter(model.second.weight[:, :, :1, :1].clone())
    model.norm.weight = model.second.bias


def add_a_hook(model: Any) -> None:
    model.second.register_forward_hook(lambda module, args, output: output + 1)


def own_forward(model: Any) -> None:
    model.norm.forward = lambda y: y * 2


def another_layer(model: Any) -> None:
    model.first = nn.Conv2d(3, 4, 3, padding=1)


@pytest.mark.parametrize(
    "change",
    [
        change_power, change_a_list, change_settings, change_a_constant, change_a_global, share_a_layer, add_a_hook,
        own_forward, another_layer,
    ],
)  # fmt: skip
def test_what_changes_the_graph_is_captured_anew(
    change: Callable[[Any], None], count: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    model = Net().eval()
    right(model)
    change(model)
    right(model)
    assert len(count) == 2


def test_a_pt2_file_is_held_to_the_model_that_it_is_made_of(
    count: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    model = Net().eval()
    model.kept = 1.0  # a tensor here would give each copy a structure of its own
    for factor in (2.0, 4.0):  # which the structure of the model does not say
        monkeypatch.setitem(globals(), "FACTOR", factor)
        export_pt2(model, x(), tmp_path / "m.pt2")
        torch.testing.assert_close(read_pt2(tmp_path / "m.pt2")[0](x()), model(x()))
    assert len(count) == 2


class Caching(nn.Module):
    """What it computes of its parameter it keeps for later, as LeViT's attention does with its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias, self.kept = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 1, 1)), {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias.exp()
        return self.first(x) + self.kept["bias"]


def test_what_a_forward_keeps_in_inference_mode_is_part_of_the_structure(count: list[Any]) -> None:
    model = Caching().eval()
    with torch.inference_mode():
        model(x())
    right(model)
    right(model)
    assert len(count) == 1


class Preset(Caching):
    """A dictionary of numbers that no forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"bias": torch.full((4, 1, 1), 3.0)}

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.kept["bias"]


class Optional(Preset):
    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.first(x), self.kept.get("bias")
        return y if bias is None else y * bias


@pytest.mark.parametrize("kind", [Preset, Optional])
def test_a_dictionary_that_is_only_read_is_kept(kind: type[Preset], count: list[Any]) -> None:
    model = kind().eval()
    right(model)
    model.kept["bias"] *= 2
    right(model)
    assert model.kept["bias"].max() == 6


def test_captures_keep_no_model_in_memory(count: list[Any]) -> None:
    model = Net().eval()
    gone = weakref.ref(model), weakref.ref(model.first.weight), weakref.ref(model.shift)
    trace(model, x())
    count.clear()
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None, None]
    assert len(capture._known) == 1


def test_captures_are_bounded(count: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_MOST_OPERATORS", 60)
    for width in range(4, 14):
        trace(nn.Sequential(*[nn.Conv2d(width, width, 1) for _ in range(4)]), torch.zeros(2, width, 4, 4))
    kept = [len(each.program.graph.nodes) for each in capture._known.values()]
    assert 1 <= len(kept) < 10
    assert sum(kept) <= 60


def test_files_of_a_shared_capture_hold_their_own_numbers(count: list[Any], tmp_path: Path) -> None:
    models = [Net().eval()]
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(copy.deepcopy(models[0]))
        models[-1].kept = models[0].kept
        nn.init.normal_(models[-1].first.weight)
        models[-1].shift.fill_(seed + 4)
    for number, model in enumerate(models):
        trace(model, x())
        pt2, terse = tmp_path / f"{number}.pt2", tmp_path / f"{number}.terse"
        export_pt2(model, x(), pt2)
        save_terse(model, x(), terse)
        torch.testing.assert_close(read_pt2(pt2)[0](x()), model(x()))
        torch.testing.assert_close(load_terse(terse)(x()), model(x()))
        # What plain PyTorch reads is the same, and says nothing of the author's lines.
        assert b"test_captured_once.py" not in pt2.read_bytes()
        torch.testing.assert_close(torch.export.load(io.BytesIO(pt2.read_bytes())).module()(x()), model(x()))
    assert any("test_captured_once.py" in str(node.meta.get("stack_trace")) for node in _nodes())


def _nodes() -> list[Any]:
    return [node for kept in capture._known.values() for node in kept.program.graph.nodes]
