"""Rewind and keep_early: earlier weights come back under the masks; the file holds those of the right moment."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tersenet.bricks.mask import attach, mask_of
from tersenet.errors import FileError, ModelError, SettingsError
from tersenet.pruning.rewind import KeepEarly, Rewind
from tersenet.quantization.quantize import Quantize
from tersenet.recipe import Recipe
from tersenet.rewrite.settle import Settle
from tersenet.step import Companion
from tersenet.task import Task
from tersenet.train import Train


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 6, 6, generator=generator), torch.arange(8) % 2) for _ in range(count)]


def task_of(original: nn.Module | None = None, **more: Any) -> Task:
    return Task(example=torch.zeros(2, 3, 6, 6), train=batches(), original=original, quiet=True, **more)


def masked(model: nn.Module) -> nn.Module:
    """Every second weight of both layers with weights is masked."""
    for index in (0, 4):
        mask = attach(model[index]).mask  # type: ignore[index]
        mask.view(-1)[::2] = False
    return model


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def test_surviving_weights_go_back_and_masks_stay() -> None:
    early, model = net(1), masked(net(2))
    kept = numbers(model)
    same, plan = Rewind().run(model, task_of(early))
    assert same is model
    assert plan == {}
    for index in (0, 4):
        layer, was = model[index], early[index]  # type: ignore[index]
        mask = mask_of(layer).mask  # type: ignore[union-attr]
        assert torch.equal(mask, kept[f"{index}.parametrizations.weight.0.mask"])
        assert torch.equal(layer.weight, torch.where(mask, was.weight, 0.0))
        assert torch.equal(layer.bias, was.bias)
    assert torch.equal(model[1].running_mean, early[1].running_mean)  # type: ignore[index]


def test_a_file_of_a_masked_model_serves_a_masked_and_a_plain_one(tmp_path: Path) -> None:
    early = masked(net(1))
    save_file(numbers(early), tmp_path / "early.safetensors")
    step = Rewind(to=str(tmp_path / "early.safetensors"))
    for model in (masked(net(2)), net(2)):
        step.fit(model, task_of())
        stored = model.state_dict()
        name = "0.parametrizations.weight.original" if mask_of(model[0]) else "0.weight"  # type: ignore[index]
        assert torch.equal(stored[name], early.state_dict()["0.parametrizations.weight.original"])


def test_only_and_skip() -> None:
    early, model = net(1), masked(net(2))
    before = numbers(model)
    Rewind(only=("linear",)).fit(model, task_of(early))
    after = numbers(model)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"4.parametrizations.weight.original", "4.bias"}


def test_cut_channels_are_refused_and_the_model_stays() -> None:
    model = net(2)
    model[4] = nn.Linear(32, 2)  # type: ignore[index,operator]
    before = numbers(model)
    with pytest.raises(ModelError, match=r"4\.weight has shape \(2, 32\).*\(2, 64\)"):
        Rewind().fit(model, task_of(net(1)))
    assert all(torch.equal(value, before[key]) for key, value in numbers(model).items())
    model[1] = nn.GroupNorm(2, 4)  # type: ignore[index,operator]
    model.insert(5, nn.Linear(2, 2))  # type: ignore[operator]
    with pytest.raises(ModelError, match="are not there"):
        Rewind(only=("5",)).fit(model, task_of(net(1)))


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="keep_early"):
        Rewind(to=str(tmp_path / "none.safetensors")).fit(net(), task_of())
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 40)
    with pytest.raises(FileError, match="damaged"):
        Rewind(to=str(broken)).fit(net(), task_of())
    with pytest.raises(SettingsError, match="original"):
        Rewind().fit(net(), task_of())


@pytest.mark.parametrize(
    "make", [lambda: Rewind(to="early.pt"), lambda: KeepEarly(at=1.0), lambda: KeepEarly(path="x")]
)
def test_settings_that_make_no_sense(make: Any) -> None:
    with pytest.raises(SettingsError):
        make()


def test_settings_survive_yaml() -> None:
    train = Train(companions=(KeepEarly(at=0.05, path="runs/early.safetensors"),))
    recipe = Recipe((train, Rewind(to="runs/early.safetensors", skip=("linear",))))
    known = {"rewind": Rewind, "keep_early": KeepEarly}
    assert Recipe.parse(recipe.dump(), steps=known) == recipe  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch(Companion):
    """Keeps the weights before every batch, and kills the process before the last that is allowed."""

    seen: ClassVar[list[dict[str, Tensor]]] = []
    left: ClassVar[list[int]] = [1000]

    def tick(self, model: nn.Module, progress: float) -> None:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise KeyboardInterrupt
        self.seen.append(numbers(model))


def trained(path: Path, at: float, folder: Path | None = None, allowed: int = 1000) -> None:
    """Two epochs of five batches."""
    Watch.left[0] = allowed
    companions = (Watch(), KeepEarly(at=at, path=str(path)))
    train = Train(epochs=2, learning_rate=0.1, save_every_s=0.0, logger="none", companions=companions)
    train.run(net(), task_of(folder=folder))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("at", "batch"), [(0.0, 0), (0.05, 1), (0.3, 3), (0.9, 9)])
def test_the_file_holds_the_weights_after_that_share(at: float, batch: int, tmp_path: Path) -> None:
    Watch.seen.clear()
    trained(tmp_path / "early.safetensors", at)
    assert len(Watch.seen) == 10
    found = load_file(tmp_path / "early.safetensors")
    assert [equal(found, each) for each in Watch.seen].index(True) == batch
    model = net(2)
    Rewind(to=str(tmp_path / "early.safetensors")).fit(model, task_of())
    assert equal(numbers(model), found)


def cut(stops: Iterable[int], tmp_path: Path, at: float) -> Path:
    path = tmp_path / "early.safetensors"
    for allowed in stops:
        with pytest.raises(KeyboardInterrupt):
            trained(path, at, tmp_path / "state", allowed)
    trained(path, at, tmp_path / "state")
    return path


@pytest.mark.parametrize("stops", [(2,), (3,), (4,), (1, 1, 1, 4)])
def test_a_training_that_was_cut_writes_the_same_file(stops: tuple[int, ...], tmp_path: Path) -> None:
    Watch.seen.clear()
    trained(tmp_path / "whole.safetensors", 0.3)
    assert equal(load_file(cut(stops, tmp_path, 0.3)), load_file(tmp_path / "whole.safetensors"))


def test_a_new_training_writes_over_the_file_of_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "early.safetensors"
    KeepEarly(at=0.3, path=str(path)).tick(net(7), 0.0)
    KeepEarly(at=0.3, path=str(path)).tick(net(7), 0.5)
    trained(path, 0.3)
    assert not torch.equal(load_file(path)["0.weight"], net(7).state_dict()["0.weight"])


def test_a_training_that_never_came_so_far_is_not_taken_for_one_that_did(tmp_path: Path) -> None:
    path = tmp_path / "early.safetensors"
    trained(path, 0.95)
    with pytest.raises(FileError, match=r"never came as far as 0\.95"):
        Rewind(to=str(path)).fit(net(), task_of())


def test_a_file_that_vanished_or_is_another_s_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "early.safetensors"
    with pytest.raises(FileError, match="there is no file"):
        KeepEarly(at=0.3, path=str(path)).tick(net(), 0.7)
    save_file(numbers(copy.deepcopy(net())), path)
    with pytest.raises(FileError, match="no file of keep_early"):
        KeepEarly(at=0.3, path=str(path)).tick(net(), 0.7)


def test_the_scales_of_a_quantized_layer_stay_and_integers_are_not_rewound() -> None:
    early = net(1)
    model, _ = Quantize(activations=None).run(net(2), task_of(early))
    scales = {key: value.clone() for key, value in model.state_dict().items() if "scale" in key}
    Rewind().fit(model, task_of(early))
    after = model.state_dict()
    assert scales
    assert all(torch.equal(after[key], value) for key, value in scales.items())
    assert torch.equal(after["0.weight"], early.state_dict()["0.weight"])
    settled, _ = Settle().run(model, task_of(early))
    with pytest.raises(ModelError, match=r"int8.*float32"):
        Rewind().fit(settled, task_of(early))


def test_the_file_lies_in_the_folder_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps keep their own state in folders of one run, early weights lie beside these, and are found there."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "run"
    model = net(1)
    train = Train(epochs=1, learning_rate=0.1, logger="none", companions=(KeepEarly(at=0.0, path="early.safetensors"),))
    trained, _ = train.run(copy.deepcopy(model), task_of(model, folder=run / "01-train.state"))
    assert (run / "early.safetensors").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
    rewound, _ = Rewind(to="early.safetensors").run(trained, task_of(model, folder=run / "02-rewind.state"))
    assert all(torch.equal(value, rewound.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(FileError, match=r"there is no file early\.safetensors"):
        Rewind(to="early.safetensors").run(net(2), task_of(model))
    # With nothing kept, and with an absolute path, it is as it is written.
    train.run(copy.deepcopy(model), task_of(model))
    assert Path("early.safetensors").is_file()
    assert KeepEarly(path=str(tmp_path / "a.safetensors")).placed(task_of(model, folder=run / "x")).path == str(
        tmp_path / "a.safetensors"
    )
