"""What a model is for: its data, loss and metric, and how an input must be prepared.

Decisions never see the test set: `train`, `calibrate` and `validate` are for choosing, `test` is read once per
reported row. Batches are (input, target) pairs or dicts and come from any iterable that can be read again; data that
also has `at(epoch, start)` can be resumed in the middle of an epoch without reading what came before.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from tersenet.errors import DataError, InputWarning, ModelError
from tersenet.metrics import Metric, contribution, metric_of
from tersenet.numerics.intervals import wilson
from tersenet.numerics.outputs import without_value
from tersenet.numerics.samples import first, together
from tersenet.numerics.scale import ACCURACY, Scale

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_LISTS = ("size", "mean", "std", "labels")
OF_DATA = "the task's data"  # the source of what is known from inputs that arrive prepared
_USUAL: dict[str, Any] = {"interpolation": "bilinear", "crop": 1.0}


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an input: shipped in the report, in ONNX metadata and in .terse files.

    Inputs are (N, C, H, W) floats: pixels scaled to [0, 1], then (x - mean) / std per channel.

    Args:
        size: (height, width) of an input.
        mean, std: per channel, of pixels in [0, 1].
        labels: names of the classes, in the order of the outputs.
        interpolation: how an image is resized: nearest, bilinear, bicubic or lanczos.
        crop: the share of the resized image that becomes the input, 0 to 1: the shorter side is resized to
            size / crop, and the middle is cut out (crop_pct in timm; 224 / 256 in torchvision).
        source: where this is known from, in words, such as "timm's configuration".
        assumed: of "size", "mean" and "std", what nothing says.
    """

    size: tuple[int, int] = (32, 32)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    labels: tuple[str, ...] = ()
    interpolation: str = "bilinear"
    crop: float = 1.0
    source: str = field(default="", compare=False, repr=False)
    assumed: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(f"interpolation is {self.interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}")
        if not 0 < self.crop <= 1:
            raise DataError(f"crop is {self.crop}; give the share of the resized image to keep, above 0 and up to 1")

    @classmethod
    def unknown(cls, size: tuple[int, int] = (32, 32), channels: int = 3) -> Preparation:
        """What is assumed where nothing says how inputs are prepared: pixels from -1 to 1."""
        return cls(size, (0.5,) * channels, (0.5,) * channels, assumed=("size", "mean", "std"))

    @classmethod
    def of_inputs(cls, inputs: Tensor | tuple[Tensor, ...]) -> Preparation:
        """What prepared inputs tell: the size of one image, (N, C, H, W); nothing where they are something else."""
        x = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            return cls.unknown()
        unknown = cls.unknown((x.shape[2], x.shape[3]), x.shape[1])
        return dataclasses.replace(unknown, source=OF_DATA, assumed=("mean", "std"))

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def is_of_data(self) -> bool:
        """Whether inputs arrive prepared, and nothing says how."""
        return self.source == OF_DATA

    def to_json(self) -> dict[str, Any]:
        """What files and reports keep of it: all but where it is known from, and what is as it is by default."""
        changed = {key: getattr(self, key) for key, usual in _USUAL.items() if getattr(self, key) != usual}
        assumed = {"assumed": list(self.assumed)} if self.assumed else {}  # no file turns it into a fact
        return {key: list(getattr(self, key)) for key in _LISTS} | changed | assumed

    def metadata(self) -> dict[str, str]:
        """What a file says about its inputs: tersenet.size, .mean, .std and .labels, each as JSON, where they are not
        the usual ones .interpolation and .crop, and what of it is .assumed."""
        return {f"tersenet.{key}": json.dumps(value) for key, value in self.to_json().items()}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> Preparation | None:
        """The inverse of `metadata`; None where a file does not say it (whole and sound)."""
        try:
            lists: dict[str, Any] = {key: tuple(json.loads(metadata[f"tersenet.{key}"])) for key in _LISTS}
            kept = {key: json.loads(metadata[f"tersenet.{key}"]) for key in _USUAL if f"tersenet.{key}" in metadata}
            assumed = tuple(json.loads(metadata.get("tersenet.assumed", "[]")))
            return cls(**lists, **kept, source="" if assumed else "the file", assumed=assumed)
        except (DataError, KeyError, TypeError, ValueError):
            return None


@runtime_checkable
class Resumable(Protocol):
    """Batches that can start anywhere: the same (epoch, start) always gives the same batches."""

    def __len__(self) -> int: ...
    def at(self, epoch: int, start: int = 0) -> Iterator[Any]: ...


def batches_at(data: Iterable[Any], epoch: int, start: int = 0) -> Iterator[Any]:
    """The batches of one epoch from batch `start` on. Other iterables are read and thrown away up to there."""
    if isinstance(data, Resumable):
        return data.at(epoch, start)
    return itertools.islice(iter(data), start, None)


@dataclass(frozen=True)
class Score:
    """A score with what it rests on. `value` is top-1 accuracy (0 to 1) or the task's own metric, as `scale` says;
    `low` and `high` are None where the metric has no interval; `without_value` is how many samples have NaN among
    their outputs, which count as wrong."""

    value: float
    low: float | None
    high: float | None
    samples: int
    top5: float | None = None
    without_value: int = 0
    scale: Scale = ACCURACY

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def nan_text(self) -> str:
        """The sentence on these samples."""
        return (
            f"the outputs of {self.without_value} of {self.samples} samples hold NaN, which an accuracy counts as "
            "wrong; check the model's weights and these inputs"
        )


# Beyond the values that prepared images can have, by so many times, data are of another kind: pixels of 0 to 255.
_FAR = 20.0
INPUT_KEYS = ("image", "input", "pixel_values", "x")  # what a dict may call its input
_LOGITS = ("logits", "out")  # what a dict of outputs may call its class scores; "out" as torchvision does


def default_forward(model: nn.Module, batch: Any) -> Tensor:
    """The class scores of a batch; of several outputs those that `scored_output` names."""
    outputs = model(*inputs_of(batch))
    return outputs if isinstance(outputs, Tensor) else scored_output(outputs)[1]


def scored_output(outputs: Any) -> tuple[str, Tensor]:
    """(name, class scores) of a model with several outputs: what a dict calls "logits" or "out", else the only one of
    shape (N, classes).

    Raises:
        ModelError: when none or several could be meant; lists them.
    """
    found = {
        "".join(map(str, path)).strip("[]'") or "output": leaf
        for path, leaf in tree_flatten_with_path(outputs)[0]
        if isinstance(leaf, Tensor)
    }
    named = [name for name in _LOGITS if isinstance(outputs, dict) and isinstance(outputs.get(name), Tensor)]
    shaped = [name for name, leaf in found.items() if leaf.ndim == 2 and leaf.is_floating_point()]
    chosen = named[:1] or (shaped if len(shaped) == 1 else [])
    if not chosen:
        listed = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in found.items()) or "none"
        raise ModelError(
            f"the outputs of the model are {listed}; which of them are the class scores is not clear, so pass "
            "Task(forward=...) that returns them, such as lambda model, batch: model(batch[0])[0]"
        )
    return chosen[0], found[chosen[0]]


def default_loss(outputs: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch_target(batch))


def what_is_scored(model: nn.Module, task: Task) -> str | None:
    """In words, which of several outputs the default forward scores; None where there is no choice.

    Raises:
        ModelError: as `scored_output`, where something is scored or trained.
    """
    if task.forward is not default_forward or (task.train is None and task.test is None):
        return None
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False  # flags are set directly: an exported module refuses eval()
    try:
        with torch.inference_mode():
            outputs = model(*inputs_of((task.example, None)))
    finally:
        for module, training in modes:
            module.training = training
    if isinstance(outputs, Tensor):
        return None
    return f"scores output {scored_output(outputs)[0]!r}; the other outputs are kept in the files and are not scored"


def inputs_of(batch: Any) -> tuple[Tensor, ...]:
    """All inputs of a batch by order."""
    inputs: Any = batch_input(batch)
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def samples_in(batch: Any) -> int:
    """How many samples a batch holds."""
    return len(inputs_of(batch)[0])


def batch_input(batch: Any) -> Tensor:
    """The input of a batch: first of a pair, or the dict's "image", "input" or "pixel_values". Several inputs stand
    there as a tuple, in the order in which the model takes them."""
    if isinstance(batch, dict):
        for key in INPUT_KEYS:
            if key in batch:
                return batch[key]
        raise DataError(f"a batch has no input: its keys are {sorted(batch)}; name one of them 'input'")
    return batch[0] if isinstance(batch, tuple | list) else batch


def batch_target(batch: Any) -> Tensor:
    """The target of a batch: second of a pair, or the dict's "label", "labels" or "target"."""
    if isinstance(batch, dict):
        for key in ("label", "labels", "target", "y"):
            if key in batch:
                return batch[key]
        raise DataError(f"a batch has no target: its keys are {sorted(batch)}; name one of them 'label'")
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise DataError("a batch has no target: it is not an (input, target) pair; give labelled data for this")
    return batch[1]


@dataclass
class Task:
    """Everything a step may know beside the model.

    Args:
        example: one input with a batch of at least 2, (N, C, H, W), or a tuple of all inputs by order; never data of
            the test set. Batches of several inputs are ((a, b), target).
        train: for training; None when there are no labels.
        calibrate: for ranges and statistics; labels are not used.
        validate: a held-out set that the model was not trained on, for choosing; None when there is none.
        test: read once per reported row, never to choose.
        original: the model before any step; the default teacher.
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar.
        metric: a `Metric`, or (outputs, batch) -> (N,) scores of the samples, shares from 0 to 1, higher is better;
            None means top-1 accuracy.
        preparation: how an image becomes an input, for files to say; without it they say the size of the example alone.
        seed: of everything that draws at random.
        folder: where a step that trains keeps its own state, so that it can go on after a cut; None means nowhere.
        quiet: no progress bars.
        reopen: the same task with images prepared in another way, read anew; None where that cannot be.
        open_model: opens another model by the name that a recipe has for it, such as a teacher's file; None where names
            mean nothing.
    """

    example: Tensor
    train: Iterable[Any] | None = None
    calibrate: Iterable[Any] | None = None
    validate: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    original: nn.Module | None = None
    forward: Callable[[nn.Module, Any], Any] = default_forward
    loss: Callable[[Any, Any], Tensor] = default_loss
    metric: Metric | Callable[[Any, Any], Tensor] | None = None
    preparation: Preparation = None  # type: ignore[assignment]  # filled in below
    seed: int = 0
    folder: Any = None
    quiet: bool = False
    reopen: Callable[[Preparation], Task] | None = None
    open_model: Callable[[str], nn.Module] | None = None

    def __post_init__(self) -> None:
        if self.preparation is None:
            self.preparation = Preparation.of_inputs(self.example)

    @property
    def scale(self) -> Scale:
        """Name, unit and direction of the scores."""
        return ACCURACY if self.metric is None else metric_of(self.metric).scale

    @property
    def has_inputs(self) -> bool:
        """Whether there are inputs to calibrate or reconstruct on; training data serve where there are no others."""
        return self.calibrate is not None or self.train is not None

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that a step belongs to, which holds the step's own; None where nothing is kept."""
        return None if self.folder is None else Path(self.folder).parent

    def run(self, model: nn.Module, batch: Any) -> None:
        """Runs a model on a batch for what is observed inside of it; which of its outputs is scored does not matter."""
        if self.forward is default_forward:
            model(*inputs_of(batch))
        else:
            self.forward(model, batch)

    def calibration(self, limit: int = 512) -> Iterator[Any]:
        """Batches for calibration, about `limit` samples in all; the training data serves where there are none.

        Raises:
            DataError: when there is no such data, it is empty, or an input holds NaN or infinite values.
        """
        data = self.calibrate if self.calibrate is not None else self.train
        if data is None:
            raise DataError("no calibration data was given; pass calibrate= or train= (labels are not needed)")
        seen = 0
        for number, batch in enumerate(batches_at(data, 0)):
            if seen >= limit:
                break
            inputs = inputs_of(batch)
            if not all(torch.isfinite(each).all() for each in inputs if each.is_floating_point()):
                raise DataError(f"calibration batch {number} holds NaN or infinite values; remove them")
            seen += len(inputs[0])
            yield batch
        if seen == 0:
            raise DataError("the calibration data is empty (0 samples); give at least one batch")

    def check_inputs(self, inputs: tuple[Tensor, ...], number: int) -> None:
        """Raises DataError on a batch of calibration data of another shape, type or range than the model's inputs."""
        examples = inputs_of((self.example, None))
        if len(inputs) != len(examples):
            raise DataError(
                f"calibration batch {number} has {len(inputs)} inputs, the model {len(examples)}; give each batch as "
                "(inputs, target), with several inputs as a tuple"
            )
        for x, wanted in zip(inputs, examples, strict=True):
            _check_input(x, wanted, number, self.preparation)

    def inputs_like(self, model: nn.Module, limit: int) -> tuple[Tensor, ...]:
        """All inputs of calibration samples, at most `limit`, (N, ...) each, on the model's device.

        Raises:
            DataError: as `calibration` and `check_inputs`.
        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        found = []
        for number, batch in enumerate(self.calibration(limit)):
            found.append(inputs_of(batch))
            self.check_inputs(found[-1], number)
        return tuple(each.to(device) for each in first(together(found), limit))


def _check_input(x: Tensor, wanted: Tensor, number: int, preparation: Preparation) -> None:
    if x.shape[1:] != wanted.shape[1:] or x.dtype != wanted.dtype:
        raise DataError(
            f"calibration batch {number} is {list(x.shape)} of {x.dtype}, the model's input is [N, "
            f"{', '.join(map(str, wanted.shape[1:]))}] of {wanted.dtype}; prepare both alike"
        )
    if not x.is_floating_point():
        return  # indices have no range to be scaled to
    low, high = (float(value) for value in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(f"calibration batch {number} holds values that are not finite (NaN or infinity); remove them")
    reach = float(wanted.abs().max())
    if x.dim() == 4:
        pairs = zip(preparation.mean, preparation.std, strict=True)
        reach = max(reach, *(max(abs(mean), abs(1 - mean)) / std for mean, std in pairs))
    if max(-low, high) > _FAR * reach:
        raise DataError(
            f"the values of calibration batch {number} run from {low:.4g} to {high:.4g}, and those of images that are "
            f"prepared for this model reach {reach:.3g} at most; scale pixels to [0, 1], then subtract the mean and "
            "divide by the deviation"
        )


def score(
    predict: Callable[[Any], Any],
    data: Iterable[Any],
    metric: Metric | Callable[[Any, Any], Tensor] | None = None,
) -> Score:
    """Scores any callable that takes a batch and gives outputs: a model, or a file in its runtime.

    Top-1 accuracy with a 95 % Wilson interval, top-5 where there are at least five classes; another metric as it says.
    Warns `InputWarning` of samples whose outputs hold NaN.

    Args:
        predict: batch -> logits (N, classes), as a tensor.
        data: batches of (input, target).
        metric: as in Task.
    Raises:
        DataError: on no data, on labels outside 0..classes-1, or on a metric that gives NaN or no share.
    """
    found = _accuracy(predict, data) if metric is None else _by_metric(predict, data, metric_of(metric))
    if found.without_value:
        warnings.warn(found.nan_text, InputWarning, stacklevel=2)
    return found


def _by_metric(predict: Callable[[Any], Any], data: Iterable[Any], metric: Metric) -> Score:
    parts, without = [], 0
    for batch in data:
        outputs = predict(batch)
        parts.append(contribution(metric, outputs, batch))
        without += int(without_value(outputs, len(parts[-1])).sum())
    samples = _count(parts)
    floats = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    if metric.compute is None and (broken := sum(int(part.isnan().sum()) for part in floats)):
        raise DataError(
            f"the metric gives NaN for {broken} of {samples} samples, so that there is no score; it must give a "
            f"number for each{f' ({without} of them have NaN among their outputs)' if without else ''}"
        )
    value, low, high = metric.score(parts)
    return Score(value, low, high, samples, None, without, metric.scale)


def _count(parts: Sequence[Any]) -> int:
    count = sum(map(len, parts))
    if count == 0:
        raise DataError("there is nothing to score: the data is empty (0 samples); give at least one batch")
    return count


def _accuracy(predict: Callable[[Any], Any], data: Iterable[Any]) -> Score:
    values, top5, without = [], [], 0
    for batch in data:
        outputs, target = predict(batch), batch_target(batch)
        _check_logits(outputs, target)
        classes = outputs.shape[-1]
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < classes:
            raise DataError(
                f"labels run from {int(target.min())} to {int(target.max())}, but the model has {classes} classes "
                f"(0 to {classes - 1}); check the label column"
            )
        lost = without_value(outputs, len(outputs))  # which topk would take for the largest
        without += int(lost.sum())
        ranked = outputs.topk(min(5, classes), dim=-1).indices == target[:, None].to(outputs.device)
        ranked &= ~lost[:, None].to(ranked.device)
        values.append(ranked[:, 0].double())
        if classes >= 5:
            top5.append(ranked.any(dim=-1).double())
    n = _count(values)
    mean = float(torch.cat(values).mean())
    low, high = wilson(round(mean * n), n)
    return Score(mean, low, high, n, float(torch.cat(top5).mean()) if top5 else None, without)


def _check_logits(outputs: Any, target: Any) -> None:
    """Top-1 accuracy of anything else would be a number that means nothing."""
    tensors = isinstance(outputs, Tensor) and isinstance(target, Tensor)
    if tensors and outputs.ndim == 2 and target.shape == outputs.shape[:1] and not target.is_floating_point():
        return
    shapes = [
        f"{tuple(each.shape)} of {each.dtype}" if isinstance(each, Tensor) else f"a {type(each).__name__}"
        for each in (outputs, target)
    ]
    raise DataError(
        f"accuracy needs logits (N, classes) and whole labels (N,), got {shapes[0]} and {shapes[1]}; pass "
        "Task(metric=...) for another score, or Task(forward=...) to say which output is scored"
    )


def score_model(model: nn.Module, task: Task, data: Iterable[Any]) -> Score:
    """The model's score on `data`, in evaluation mode; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode():
            return score(lambda batch: task.forward(model, to_device(batch, device)), data, task.metric)
    finally:
        model.train(was_training)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
