"""`Train`: the one step that trains, alone or with companions. `Recover`: the same place for your own loop.

The settings live here; the loop is in `loop`, what is kept across a cut in `checkpoint`. Lightning Fabric is imported
when training starts and not before, because importing it costs more than a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from tersenet import augmentation
from tersenet.errors import SettingsError
from tersenet.left_alone import LEFT_OUT, LeftAlone, by_layer
from tersenet.step import Companion, Plan, Step
from tersenet.task import Task

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "constant"]
Accelerator = Literal["auto", "cpu", "cuda", "mps"]
Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_true"]
# Types of the weights stay as they are: a step that trains must not change them, so no "bf16-true".
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "auto"]
Logger = Literal["csv", "tensorboard", "mlflow", "wandb", "none"]
Keep = Literal["better", "last"]


@dataclass(frozen=True, kw_only=True)
class Train(Step):
    """Trains on the task's own loss, on what companions add, or on both. The structure stays.

    The loss of a batch is `label_weight * task.loss(outputs, batch) + sum of the companions' losses`. With a folder
    in the task it saves itself and goes on after a cut; on the CPU the final weights are then bit-identical to those
    of an uninterrupted training with the same number of threads. Of a batch, process r of R takes the samples
    r, r + R, ...; gradients are weighted by the samples, so that R processes compute the gradient of one.

    Args:
        epochs: passes over the data; 0 leaves the model as it is.
        learning_rate: its peak, after the warm-up.
        momentum: of SGD (Nesterov's form); beta1 of Adam and AdamW.
        weight_decay: of weights with two or more dimensions; biases, norms and scales are left alone (He et al.,
            arXiv:1812.01187, section 3.1).
        optimizer: sgd, adam or adamw.
        schedule: cosine to zero (arXiv:1608.03983, without restarts), or constant.
        warmup: the share of all batches over which the rate rises linearly, 0 to below 1.
        companions: extra losses and schedules; `with` in a recipe.
        augment: how training images are changed: auto (as the data says: crop_flip, of one channel crop; less where
            that costs the original more than five points, invariances.py), none, crop or crop_flip, with the pixels
            that images are moved by at most where wanted (crop:1).
        label_weight: share of the task's own loss; 0 = labels are not used, and batches need none.
        clip: largest L2 norm of the whole gradient; None = no limit.
        precision: 32-true, or mixed with bf16 or fp16; the weights stay as they are. auto takes bf16-mixed on a GPU
            that has it, and on the CPU where a few batches are more than 10 % faster with it. A training that goes on
            keeps what it chose; two new ones may choose differently where both are about as fast.
        accelerator: auto takes a GPU where there is one. The model goes back to its own device afterwards.
        devices: processes, each with one device.
        strategy: auto or ddp. With more than one device the script is started again once per device, unless a
            launcher such as torchrun did so.
        channels_last: keep images and weights as (N, H, W, C) in memory while training. Measured on a ResNet-20,
            batch 128, two CPU cores: 150 ms a batch against 216.
        compile: train through `torch.compile`, which needs a C++ compiler and about a minute at first. Pays where much
            is done to single values: signs, learned steps, activation functions.
        save_every_s: seconds between two saves in the middle of an epoch; each epoch ends with one.
        max_hours: stop with an error, after some batches, when the training would take longer; None allows all.
        logger: csv (files in the task's folder), tensorboard, mlflow, wandb or none.
        keep: better puts the numbers before the training back where it ended below its start, and says so (better.py);
            last keeps what the training ended with.
        only, skip: train only the layers that match; the others stand still, their norm statistics too.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "train"
    summary: ClassVar[str] = "trains or fine-tunes, alone or with companions such as soft targets"
    serves: ClassVar[tuple[str, ...]] = ("any layer with parameters",)
    needs: ClassVar[str] = "labels"
    needs_trained: ClassVar[bool] = False
    changes_structure: ClassVar[bool] = False

    epochs: int = 1
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: Optimizer = "sgd"
    schedule: Schedule = "cosine"
    warmup: float = 0.0
    companions: tuple[Companion, ...] = ()
    augment: str = "auto"
    label_weight: float = 1.0
    clip: float | None = None
    precision: Precision = "32-true"
    accelerator: Accelerator = "auto"
    devices: int = 1
    strategy: Strategy = "auto"
    channels_last: bool = True
    compile: bool = False
    save_every_s: float = 60.0
    logger: Logger = "csv"
    keep: Keep = "better"
    max_hours: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "companions", tuple(self.companions))
        _at_least("epochs", self.epochs, 0)
        _at_least("devices", self.devices, 1)
        _at_least("weight_decay", self.weight_decay, 0)
        _at_least("label_weight", self.label_weight, 0)
        _at_least("save_every_s", self.save_every_s, 0)
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate must be above 0, got {self.learning_rate}; to not train, use epochs: 0")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise SettingsError(f"clip must be above 0, got {self.clip}; leave it out for no limit")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in get_args(allowed):
                raise SettingsError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(get_args(allowed))}")
        if self.augment not in ("auto", "none"):
            augmentation.parse(self.augment)
        if self.max_hours is not None and not self.max_hours > 0:
            raise SettingsError(f"max_hours must be above 0, got {self.max_hours}; leave it out for no limit")
        for companion in self.companions:
            if not isinstance(companion, Companion):
                raise SettingsError(f"companions must be Companion objects, got {companion!r}")
        if self.label_weight == 0 and not self.companions:
            raise SettingsError(
                "label_weight is 0 and there are no companions, so there is no loss; add soft_targets to with"
            )

    def data_needed(self) -> str:
        return "labels" if self.label_weight > 0 else "inputs"

    def left_alone(self, model: nn.Module, plan: Plan, task: Task) -> LeftAlone | None:
        """Layers with weights that do not learn."""

        def why(path: str, layer: nn.Module) -> str | None:
            if not self.matches(path, layer):
                return LEFT_OUT
            if not any(weight.requires_grad for weight in layer.parameters() if weight.dim() > 1):
                return "are frozen (requires_grad is off) or whole numbers"
            return None

        return by_layer(model, why)

    def check(self, task: Task) -> None:
        super().check(task)
        for companion in self.companions:
            companion.opened(task)

    def fit(self, model: nn.Module, task: Task) -> None:
        """Trains the parameters that require a gradient, and leaves the model in evaluation mode.

        Raises:
            DataError: without data, without batches, or on labels out of range.
            ModelError: when nothing can be trained.
            RunError: when the task's folder holds the unfinished training of other settings or weights.
            TersenetError: when the loss is no longer a number.
        """
        if self.epochs == 0:
            return
        from tersenet.train.loop import train

        train(self, model, task)


@dataclass(frozen=True, kw_only=True)
class Recover(Step):
    """Hands the model to a training loop of your own: recover(model, task), which trains it in place. Python only."""

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "train"
    summary: ClassVar[str] = "calls your own training loop"
    serves: ClassVar[tuple[str, ...]] = ("any layer with parameters",)
    needs_trained: ClassVar[bool] = False
    changes_structure: ClassVar[bool] = False

    recover: Callable[[nn.Module, Task], Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.recover):
            raise SettingsError(f"recover must be a function of (model, task), got {self.recover!r}")

    def __repr__(self) -> str:
        """The loop by its name and code, by which a run knows it again in another process."""
        code = getattr(self.recover, "__code__", None)
        name = getattr(self.recover, "__qualname__", type(self.recover).__qualname__)
        if code is None:
            return f"Recover({name})"
        constants = [each for each in code.co_consts if isinstance(each, str | int | float | bool | type(None))]
        digest = hashlib.sha256(code.co_code + repr((constants, code.co_names)).encode()).hexdigest()
        return f"Recover({name} {digest[:16]})"

    def fit(self, model: nn.Module, task: Task) -> None:
        """Calls the loop, and leaves the model in evaluation mode.

        Raises:
            SettingsError: when the loop changed the names or shapes of the model's tensors.
        """
        before = {key: value.shape for key, value in model.state_dict().items()}
        self.recover(model, task)
        model.eval()
        after = {key: value.shape for key, value in model.state_dict().items()}
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        if changed:
            raise SettingsError(
                f"recover changed the structure of the model (such as {changed[0]!r}); it may only change numbers"
            )


_CHOICES = {
    "optimizer": Optimizer,
    "schedule": Schedule,
    "precision": Precision,
    "accelerator": Accelerator,
    "strategy": Strategy,
    "logger": Logger,
    "keep": Keep,
}


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise SettingsError(f"{name} must be at least {least}, got {value}")
