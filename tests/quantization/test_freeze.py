"""Progressive freezing: which layers stand still when, and nothing stays frozen."""

from __future__ import annotations

import copy

import pytest
import torch

from cases import task_for, tiny
from tersenet.bricks.few_bits import FewBitLayer
from tersenet.errors import SettingsError, TersenetError
from tersenet.quantization.freeze import Freeze
from tersenet.quantization.quantize_aware import QuantizeAware
from tersenet.step import Companion
from tersenet.train import Train


def test_layers_freeze_one_after_another() -> None:
    freeze = Freeze(begin=0.5, end=0.9)
    assert [freeze.count(4, progress) for progress in (0.0, 0.49, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)] == [
        0, 0, 0, 1, 2, 3, 4, 4,
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["front", "back"])
def test_frozen_weights_stand_still_and_the_others_do_not(order: str) -> None:
    model = tiny(0)
    task = task_for(model)
    changed, _ = QuantizeAware().run(copy.deepcopy(model), task)
    layers = [layer for layer in changed.modules() if isinstance(layer, FewBitLayer)]
    seen: list[list[torch.Tensor]] = []

    class Watch(Companion):
        def tick(self, model: torch.nn.Module, progress: float) -> None:
            seen.append([layer.weight.detach().clone() for layer in layers])

    Train(
        epochs=2,
        learning_rate=0.05,
        companions=(Watch(), Freeze(begin=0.0, end=1.0, order=order)),  # type: ignore[arg-type]
        logger="none",
    ).run(changed, task)
    first, last = (0, -1) if order == "front" else (-1, 0)
    assert torch.equal(seen[4][first], seen[7][first])
    assert not torch.equal(seen[4][last], seen[6][last])
    assert not torch.equal(seen[0][first], seen[1][first])
    assert not any(layer.frozen for layer in layers)


def test_bad_settings_and_models_are_refused() -> None:
    with pytest.raises(SettingsError, match="0 <= begin < end <= 1"):
        Freeze(begin=0.9, end=0.5)
    with pytest.raises(SettingsError, match="order must be front or back, got 'side'"):
        Freeze(order="side")  # type: ignore[arg-type]
    with pytest.raises(TersenetError, match="freeze found no layers of few values"):
        Train(epochs=1, companions=(Freeze(),), logger="none").run(tiny(0), task_for(tiny(0)))
