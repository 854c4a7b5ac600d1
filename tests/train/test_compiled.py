"""A training through torch.compile: the same steps, and the model itself again afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tersenet.bricks.binary import ShiftedPReLU, Sign
from tersenet.errors import SettingsError
from tersenet.task import Task
from tersenet.train import Train


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), ShiftedPReLU(4), Sign(4), nn.Flatten(), nn.Linear(144, 2)
    )


def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 3, 6, 6, generator=generator), torch.arange(8) % 2) for _ in range(3)]
    return Task(example=torch.zeros(1, 3, 6, 6), train=batches, quiet=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, about itself
def test_it_takes_the_same_steps_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch._inductor")
    calls: list[bool] = []
    compiled = nn.Module._call_impl

    def watched(self: nn.Module, *args: object, **options: object) -> object:
        if isinstance(self, nn.Sequential):
            calls.append(torch.compiler.is_compiling())
        return compiled(self, *args, **options)

    plain, model = network(), network()
    Train(epochs=2).fit(plain, task())
    monkeypatch.setattr(nn.Module, "_call_impl", watched)
    try:
        Train(epochs=2, compile=True).fit(model, task())
    except SettingsError as error:
        pytest.skip(str(error))
    assert not [call for call in calls if not call]  # the network's own code was never run but to be compiled
    monkeypatch.undo()
    assert model._compiled_call_impl is None
    assert list(model.state_dict()) == list(plain.state_dict())
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    copy.deepcopy(model)(torch.zeros(1, 3, 6, 6))


def test_without_a_compiler_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def missing() -> str:
        raise RuntimeError("none here")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(SettingsError, match=r"compile: true cannot train.*no C\+\+ compiler.*g\+\+"):
        Train(epochs=1, compile=True).fit(network(), task())
