"""How inputs are prepared: what a user or a file says, and where nothing says it, what a trial shows.

A wrong mean costs tens of points without any error, and every loss after it is measured from there. A model that is
trained answers best to the preparation that it was trained with, so common preparations are tried on labelled training
images. Test images are never read for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet.data.pixels import MODES, pixels, upright
from tersenet.data.sources import training_sample
from tersenet.deploy.runner import Runner
from tersenet.deploy.stand_in import StandIn
from tersenet.errors import DataError, InputWarning, SettingsError
from tersenet.models import IMAGENET_MEAN, IMAGENET_STD
from tersenet.numerics.intervals import wilson
from tersenet.task import Preparation, scored_output

_IMAGES = 128
_SIZES = (224, 32)
_LARGEST = 512  # of a side: photographs of one camera have one size, and no network takes them as they are
Scale = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation per channel
_RGB: tuple[Scale, ...] = (
    ((0.5,) * 3, (0.5,) * 3),
    (IMAGENET_MEAN, IMAGENET_STD),
    ((0.0,) * 3, (1.0,) * 3),  # pixels in [0, 1]
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # CIFAR-10's own
    ((0.0,) * 3, (1 / 255,) * 3),  # pixels in [0, 255]
)
_GREY: tuple[Scale, ...] = (((0.5,), (0.5,)), ((0.0,), (1.0,)), ((0.1307,), (0.3081,)), ((0.0,), (1 / 255,)))


@dataclasses.dataclass(frozen=True)
class Trial:
    """A preparation, how many of the training images the model then names rightly, and the share that always saying
    the most frequent class would."""

    preparation: Preparation
    right: int
    images: int
    by_guessing: float


@dataclasses.dataclass(frozen=True)
class Preparing:
    """What a user says about how images become inputs; each part is None where nothing is said.

    Args:
        mean, std: per channel, of pixels in [0, 1].
        size: (height, width).
        interpolation, crop: as in `Preparation`.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: tuple[int, int] | None = None
    interpolation: str | None = None
    crop: float | None = None

    def applied(self, preparation: Preparation) -> Preparation:
        """A preparation with these parts.

        Raises:
            SettingsError: when mean and std are not one per channel of the model, or cannot be meant for values in
                [0, 1], or interpolation and crop are none that there are.
        """
        for name in ("mean", "std"):
            _check_scale(name, getattr(self, name), preparation.channels)
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list | tuple) else value
            for name, value in parts.items()
            if value is not None
        }
        if not given:
            return preparation
        complete = {"mean", "std", "size"} <= given.keys() or not preparation.source
        source = f"{', '.join(given)} as given" + ("" if complete else f", else {preparation.source}")
        assumed = tuple(name for name in preparation.assumed if name not in given)
        try:
            return dataclasses.replace(preparation, **given, source=source, assumed=assumed)
        except DataError as error:
            raise SettingsError(str(error)) from error


AS_SAID = Preparing()


def _check_scale(name: str, values: Sequence[float] | None, channels: int) -> None:
    """Refuses a mean or std that cannot be of values in [0, 1], or is not one per channel."""
    if values is None:
        return
    shown = ",".join(f"{value:g}" for value in values)
    if name == "std" and not all(value > 0 for value in values):
        raise SettingsError(f"std must be positive, got {shown}")
    top = max(values)
    if not all(0 <= value <= 1 for value in values):
        hint = "give it as a share of white"
        if 1 < top <= 255:
            hint = f"divide it by 255: --{name} {','.join(f'{value / 255:.4g}' for value in values)}"
        raise SettingsError(f"{name} is {shown}, but pixels are scaled to [0, 1] before it is used; {hint}")
    if len(values) != channels:
        raise SettingsError(
            f"{name} has {len(values)} value{'s' * (len(values) != 1)} ({shown}) and the model takes {channels} "
            f"channel{'s' * (channels != 1)}; give one per channel"
        )


def preparation_of(
    runner: Runner,
    preparing: Preparing = AS_SAID,
    data: str | None = None,
    columns: tuple[str, str] | None = None,
) -> Preparation:
    """How a file's inputs are prepared: as the file says, as the user gives it, and else as assumed, with a warning.

    Args:
        preparing: what the user says.
        data: labelled images that a preparation can be chosen by, as in `open_data`.
    Raises:
        SettingsError: when the file does not take one input, images of one size, or what was given does not fit it.
    """
    found = preparing.applied(Preparation.of_metadata(runner.metadata) or _of_shape(runner))
    if not found.assumed:
        return found
    return chosen_preparation(StandIn(runner), found, data or "", columns)


def _of_shape(runner: Runner) -> Preparation:
    """What the input of a file of other makers tells."""
    shapes = [each.shape for each in runner.expected]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in (1, 3):
        takes = ", ".join(each.said for each in runner.expected)
        raise SettingsError(
            f"{runner.name} does not say how its inputs are prepared and takes {takes}; images are (N, C, H, W) with 1 "
            "or 3 channels"
        )
    _, channels, height, width = shapes[0]
    assert channels is not None
    unknown = Preparation.unknown(channels=channels)
    if height is None or width is None:
        return unknown
    return dataclasses.replace(unknown, size=(height, width), assumed=("mean", "std"))


def chosen_preparation(
    answers: Callable[[Tensor], Any],
    preparation: Preparation,
    data: str,
    columns: tuple[str, str] | None = None,
) -> Preparation:
    """The preparation that a model answers best to. Warns `InputWarning`, with what was found.

    Args:
        answers: images (N, C, H, W) -> outputs.
        preparation: what is assumed where no trial can tell; what is not assumed of it stays.
        data: as in `open_data`; its training images are used, at most 128.
    """
    trials = list(_trials(answers, preparation, data, columns)) if data else []
    found, sentence = _best(trials, preparation)
    warnings.warn(
        f"nothing says how the model's inputs are prepared{sentence}; give --mean, --std and --image-size as in its "
        "training",
        InputWarning,
        stacklevel=3,
    )
    return found


def _best(trials: Sequence[Trial], preparation: Preparation) -> tuple[Preparation, str]:
    """The preparation to take, and the words on it."""
    if not trials:
        return preparation, f": {shown(preparation)} is assumed"
    best = max(trials, key=lambda trial: trial.right / trial.images)
    # Of many trials the best is up by chance, too.
    if wilson(best.right, best.images, z=3.0)[0] <= best.by_guessing:
        return preparation, (
            f", and none of {len(trials)} common preparations does better than guessing on {best.images} training "
            f"images: {shown(preparation)} is assumed"
        )
    found = dataclasses.replace(
        best.preparation, labels=preparation.labels, source="a trial on training images", assumed=()
    )
    others = [trial.right / trial.images for trial in trials if trial is not best]
    second = f", the next best {100 * max(others):.1f} %" if others else ""
    return found, (
        f": of {len(trials)} common preparations {shown(found)} is used, which has "
        f"{100 * best.right / best.images:.1f} % of {best.images} training images right{second}"
    )


def shown(preparation: Preparation) -> str:
    """ "3x32x32 with mean 0.5 and std 0.5", each channel's where they differ."""

    def values(each: Sequence[float]) -> str:
        return ",".join(f"{value:.4g}" for value in (each if len(set(each)) > 1 else each[:1]))

    size = "x".join(map(str, (preparation.channels, *preparation.size)))
    return f"{size} with mean {values(preparation.mean)} and std {values(preparation.std)}"


def _trials(
    answers: Callable[[Tensor], Any],
    preparation: Preparation,
    data: str,
    columns: tuple[str, str] | None,
) -> Iterator[Trial]:
    """One for each size and scale that the model runs with; none where there are no labelled training images."""
    if preparation.channels not in MODES:
        return
    scales = _RGB if preparation.channels == 3 else _GREY
    # What the user gave stays.
    means = [mean if "mean" in preparation.assumed else preparation.mean for mean, _ in scales]
    stds = [std if "std" in preparation.assumed else preparation.std for _, std in scales]
    for size, (x, labels, names) in _samples(preparation, data, columns).items():
        by_guessing = float(labels.bincount().max() / len(labels))
        for mean, std in dict.fromkeys(zip(means, stds, strict=True)):
            right = _right(answers, x, labels, mean, std)
            if right is None:
                break  # it does not run at this size
            tried = dataclasses.replace(preparation, size=size, mean=mean, std=std, labels=names)
            yield Trial(tried, right, len(labels), by_guessing)


def _samples(
    preparation: Preparation, data: str, columns: tuple[str, str] | None
) -> dict[tuple[int, int], tuple[Tensor, Tensor, tuple[str, ...]]]:
    """Size -> (pixels in [0, 1], labels, names of the classes) of some training images, at the sizes to try.

    An image is opened once and kept at these sizes only. Its own size is one of them where all have it and it is small.
    """
    is_open = "size" in preparation.assumed
    usual = [preparation.size, *((side, side) for side in _SIZES)] if is_open else [preparation.size]
    found: dict[tuple[int, int], tuple[list[Any], list[int]]] = {}
    own: set[tuple[int, int]] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opening the data for the run says it
        sample, names = training_sample(data, preparation, columns, _IMAGES)
        for image, label in sample:
            own.add(_size_of(image))
            alike = is_open and len(own) == 1 and max(max(own)) <= _LARGEST
            for size in dict.fromkeys([*(own if alike else ()), *usual]):
                images, labels = found.setdefault(size, ([], []))
                if len(images) < (_IMAGES if max(size) <= 128 else _IMAGES // 2):  # large ones take longer
                    with contextlib.suppress(ValueError):  # opening the data for the run names the image
                        images.append(pixels(image, dataclasses.replace(preparation, size=size)))
                        labels.append(label)
    return {
        size: (torch.from_numpy(np.stack(images)).float() / 255, torch.tensor(labels), names)
        for size, (images, labels) in found.items()
        if images and (len(own) == 1 or size in usual)
    }


def _size_of(image: Any) -> tuple[int, int]:
    shape = upright(image).shape if isinstance(image, np.ndarray) else (image.height, image.width)
    return int(shape[0]), int(shape[1])


def _right(
    answers: Callable[[Tensor], Any], x: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]
) -> int | None:
    """How many of the images are named rightly; None where the model does not take them or gives no class scores."""
    center, scale = (torch.tensor(tuple(each))[:, None, None] for each in (mean, std))
    right = 0
    for part, wanted in zip(x.split(32), labels.split(32), strict=True):
        try:
            outputs = answers((part - center) / scale)
            outputs = outputs if isinstance(outputs, Tensor) else scored_output(outputs)[1]
        except Exception:  # noqa: BLE001 - the user's code raises what it likes on inputs that it does not take
            return None
        if outputs.dim() != 2 or outputs.shape[1] <= int(labels.max()):
            return None
        right += int((outputs.argmax(1).cpu() == wanted).sum())
    return right
