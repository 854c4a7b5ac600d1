"""Train and Recover: they learn, ask the companions, stop on bad data, and leave the model as it should be."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import DataError, ModelError, SettingsError, TersenetError
from tersenet.step import Companion
from tersenet.task import Task
from tersenet.train import Recover, Train
from tersenet.train.batches import training_data

Batch = tuple[Tensor, Tensor]


def images(count: int = 128, size: int = 32, seed: int = 0) -> list[Batch]:
    """Two classes that differ in brightness, (size, 3, 6, 6) a batch."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    x = torch.randn(count, 3, 6, 6, generator=generator) * 0.5 + (y * 2.0 - 1)[:, None, None, None]
    return [(x[i : i + size], y[i : i + size]) for i in range(0, count, size)]


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 2)
        ).eval()


def task_of(data: Any, **more: Any) -> Task:
    return Task(example=torch.zeros(2, 3, 6, 6), train=data, quiet=True, **more)


def loss_on(model: nn.Module, data: list[Batch]) -> float:
    with torch.no_grad():
        return float(sum(nn.functional.cross_entropy(model(x), y) for x, y in data) / len(data))


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[key]) for key, value in a.state_dict().items())


@dataclass(frozen=True, kw_only=True)
class Watch(Companion):
    """Writes down what it is told."""

    seen: list[float] = field(default_factory=list)
    extra: Any = 0.0

    def tick(self, model: nn.Module, progress: float) -> None:
        self.seen.append(progress)

    def loss(self, model: nn.Module, task: Task, batch: Any, outputs: Any) -> Any:
        return self.extra(outputs) if callable(self.extra) else self.extra


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw", "warmup": 0.3},
        {"optimizer": "adam", "schedule": "constant", "clip": 1.0},
        {"precision": "bf16-mixed", "channels_last": False, "momentum": 0.0},
    ],
)
def test_it_learns(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, data = net(), images()
    before = loss_on(model, data)
    same_model, plan = Train(epochs=4, learning_rate=0.02, accelerator="cpu", **settings).run(model, task_of(data))
    assert same_model is model
    assert plan == {}
    assert loss_on(model, data) < before / 2
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and p.is_contiguous() and p.dtype == torch.float32 for p in model.parameters())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("epoch 4/4: loss ")
    assert "accuracy" in lines[-1]
    assert "samples/s" in lines[-1]


def test_it_equals_a_loop_by_hand() -> None:
    """Without dropout and in the usual memory layout, three epochs are plain SGD in torch, bit for bit."""
    data, settings = images(), {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    model, twin = net(), net()
    model[3], twin[3] = nn.Identity(), nn.Identity()
    step = Train(epochs=3, schedule="constant", clip=0.5, channels_last=False, accelerator="cpu", **settings)
    step.fit(model, task_of(data))

    twin.train()
    decayed, rest = [twin[0].weight, twin[5].weight], [twin[0].bias, *twin[1].parameters(), twin[5].bias]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)
    for _ in range(3):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x), y).backward()
            nn.utils.clip_grad_norm_([*decayed, *rest], 0.5)
            optimizer.step()
    assert same(model, twin)


def test_zero_epochs_change_nothing() -> None:
    model = net()
    Train(epochs=0).fit(model, task_of(None))
    assert same(model, net())


def test_companions_are_ticked_and_their_losses_added() -> None:
    watch = Watch(extra=lambda outputs: 10 * (outputs - 3).square().mean())
    model = net()
    Train(epochs=3, learning_rate=0.005, companions=(watch,), accelerator="cpu").fit(model, task_of(images()))
    assert watch.seen == [i / 12 for i in range(12)]
    x = images()[0][0]
    assert abs(float(net()(x).detach().mean())) < 0.5
    assert model(x).mean() > 1.5, "the extra loss pulls the outputs to 3"


def test_progress_stays_below_one_when_data_is_longer_than_it_says() -> None:
    class Liar(list[Batch]):
        def __len__(self) -> int:
            return 2

    watch = Watch()
    Train(epochs=2, companions=(watch,), accelerator="cpu").fit(net(), task_of(Liar(images())))
    assert watch.seen == sorted(watch.seen)
    assert watch.seen[0] == 0
    assert watch.seen[-1] < 1


def test_without_labels_the_companions_can_teach() -> None:
    inputs = [x for x, _ in images()]
    watch = Watch(extra=lambda outputs: outputs.square().mean())
    model = net()
    step = Train(epochs=4, learning_rate=0.05, label_weight=0, companions=(watch,), accelerator="cpu")
    step.fit(model, Task(example=inputs[0], calibrate=inputs, quiet=True))
    assert model(inputs[0]).square().mean() < net()(inputs[0]).square().mean() / 2


def test_the_same_seed_gives_the_same_bits_and_the_global_chance_is_left_alone() -> None:
    def trained(seed: int) -> nn.Module:
        model = net()
        Train(epochs=2, accelerator="cpu").fit(model, task_of(images(), seed=seed))
        return model

    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(2), np.random.rand(2), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    first = trained(1)
    drawn = torch.rand(2), np.random.rand(2), random.random()
    assert torch.equal(drawn[0], expected[0])
    assert (drawn[1] == expected[1]).all()
    assert drawn[2] == expected[2]
    assert same(first, trained(1))
    assert not same(first, trained(2)), "dropout must depend on the seed"


def test_only_the_chosen_layers_are_trained() -> None:
    model = net()
    model[5].bias.requires_grad_(False)
    Train(epochs=1, only=("linear",), accelerator="cpu").fit(model, task_of(images()))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, net().state_dict()[key])}
    assert changed == {"5.weight"}, "the statistics of a norm that is left out stand still too"
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["5.bias"]


def test_a_parametrized_layer_is_known_by_its_own_path_and_type() -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model[5])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Train(epochs=1, only=("linear",), accelerator="cpu").fit(model, task_of(images()))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"5.bias", "5.parametrizations.weight.original0", "5.parametrizations.weight.original1"}


def test_dictionaries_and_other_forwards_work() -> None:
    data = [{"pixels": x, "extra": ["a"], "wanted": y.float()} for x, y in images()]
    task = task_of(
        data,
        forward=lambda model, batch: model(batch["pixels"])[:, 0],
        loss=lambda outputs, batch: nn.functional.binary_cross_entropy_with_logits(outputs, batch["wanted"]),
    )
    model = net()
    Train(epochs=4, learning_rate=0.02, accelerator="cpu").fit(model, task)
    right = torch.cat([(model(b["pixels"])[:, 0] > 0) == (b["wanted"] > 0.5) for b in data])
    assert right.float().mean() > 0.9


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "task.train is None.*soft_targets"),
        ([], r"0 batches"),
        (iter(images()), "only once"),
        ([(x, y + 1) for x, y in images()], "labels run from 1 to 2, but the model has 2 classes"),
        ([(x, y - 1) for x, y in images()], "labels run from -1 to 0"),
        ([x for x, _ in images()], "no target"),
    ],
)
def test_bad_data_is_one_sentence(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Train(accelerator="cpu").fit(net(), task_of(data))


def test_data_that_runs_dry_is_said() -> None:
    class Once:
        def __init__(self) -> None:
            self.items = iter(images())

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[Batch]:
            return self.items

    with pytest.raises(DataError, match="no batch in epoch 2"):
        Train(epochs=2, accelerator="cpu").fit(net(), task_of(Once()))


def test_a_loss_that_is_no_number_stops_the_training_where_it_happened(tmp_path: Any) -> None:
    data = images()
    data[2] = (data[2][0] * float("nan"), data[2][1])
    model = net()
    with pytest.raises(TersenetError, match=r"nan in epoch 1, batch 3 .*learning_rate"):
        Train(epochs=2, save_every_s=0, accelerator="cpu").fit(model, task_of(data, folder=tmp_path))
    assert not list(tmp_path.glob("*.ckpt")), "going on from it would end in the same place"
    assert not model.training


def test_nothing_to_train_is_said() -> None:
    frozen = net()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter to train"):
        Train(accelerator="cpu").fit(frozen, task_of(images()))
    with pytest.raises(SettingsError, match=r"companions \(watch\) add no loss"):
        Train(label_weight=0, companions=(Watch(),), accelerator="cpu").fit(net(), task_of(images()))


class Changed(list[Batch]):
    """Batches that can be had otherwise, as tersenet's own can."""

    asked: tuple[str | None, ...] = ()

    def like(self, augment: str | None) -> Changed:
        other = Changed([(x * 0, y) for x, y in self])
        self.asked = other.asked = (*self.asked, augment)
        return other


@pytest.mark.parametrize(("augment", "asked"), [("auto", ()), ("none", (None,)), ("crop:1", ("crop:1",))])
def test_images_are_changed_as_the_settings_say(augment: str, asked: tuple[str | None, ...]) -> None:
    data = Changed(images())
    model = net()
    before = model[0].weight.detach().clone()
    step = Train(epochs=1, augment=augment, optimizer="sgd", momentum=0.0, weight_decay=0.0, accelerator="cpu")
    step.fit(model, task_of(data))
    assert data.asked == asked
    assert torch.equal(model[0].weight, before) is bool(asked)  # black images have no gradient in the first layer
    unlabelled = Task(example=torch.zeros(2, 3, 6, 6), calibrate=data, quiet=True)
    assert training_data(Train(label_weight=0, augment=augment, companions=(Watch(),)), unlabelled) is not None
    assert data.asked == 2 * asked
    with pytest.raises(DataError, match=r"augment is 'none', but the training data \(list\) is not tersenet's"):
        Train(epochs=1, augment="none", accelerator="cpu").fit(net(), task_of(images()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"optimizer": "sdg"}, "optimizer is 'sdg'; allowed: sgd, adam, adamw"),
        ({"precision": "bf16-true"}, "allowed: 32-true, bf16-mixed"),
        ({"devices": 0}, "devices must be at least 1"),
        ({"label_weight": 0}, "there is no loss"),
        ({"augment": "mirror"}, "augment is 'mirror'; allowed: none, crop"),
        ({"companions": ("soft_targets",)}, "must be Companion objects"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Train(**settings)


def test_recover_calls_the_users_own_loop() -> None:
    def loop(model: nn.Module, task: Task) -> None:
        model.train()
        with torch.no_grad():
            model[5].bias += task.seed

    model, _ = Recover(recover=loop).run(net(), task_of(None, seed=7))
    assert torch.equal(model[5].bias, net()[5].bias + 7)
    assert not model.training

    def breaks(model: nn.Module, task: Task) -> None:
        model[5] = nn.Linear(64, 3)

    with pytest.raises(SettingsError, match=r"recover: recover changed the structure.*'5\.bias'"):
        Recover(recover=breaks).run(net(), task_of(None))
    with pytest.raises(SettingsError, match="function of"):
        Recover(recover=3)  # type: ignore[arg-type]
