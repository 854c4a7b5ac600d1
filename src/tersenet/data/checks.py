"""What in data makes a score or a calibration mean less than it seems: said before anything is computed with it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.data.classes import listed
from tersenet.data.sources import Sources
from tersenet.errors import DataError, InputWarning


def outputs_of(model: nn.Module, example: Tensor) -> int | None:
    """The number of a classifier's outputs; None where the model gives something else, or does not run."""
    was_training = model.training
    place = next((value.device for value in model.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode():
            outputs: Any = model.eval()(example.to(place))
    except Exception:  # noqa: BLE001 - capturing the model says what is wrong, and where
        return None
    finally:
        model.train(was_training)
    return int(outputs.shape[1]) if isinstance(outputs, Tensor) and outputs.dim() == 2 else None


def check_classes(found: Sources, outputs: int | None, data: str) -> None:
    """Holds the classes of the data against the outputs of the model, and against a score that means nothing.

    Raises:
        DataError: when a label has no output.
    """
    present = sorted(
        {
            int(label)
            for part in (found.train, found.validate, found.test)
            if part is not None and part.labels is not None
            for label in part.labels.unique()
        }
    )
    if not present:
        return
    if outputs is not None and present[-1] >= outputs:
        name = found.labels[present[-1]] if present[-1] < len(found.labels) else str(present[-1])
        raise DataError(
            f"{data} has {max(len(found.labels), present[-1] + 1)} classes and the model has {outputs} outputs, none "
            f"for class {present[-1]} ({name}); give weights of a model with as many outputs, or data of its classes"
        )
    if outputs is not None and len(present) < outputs and len(present) > 1:
        warnings.warn(
            f"{data} has images of {len(present)} classes and the model has {outputs} outputs; the others are never "
            "right",
            InputWarning,
            stacklevel=3,
        )
    tested = found.test.labels if found.test is not None else None
    if tested is not None and len(tested.unique()) == 1:
        warnings.warn(
            f"all {len(tested)} test images of {data} are of one class, so that the score says little",
            InputWarning,
            stacklevel=3,
        )


def check_calibration(found: Sources, data: str) -> None:
    """Warns of images for calibration that are all of one plain value: no range can be learnt from them."""
    part = found.calibrate if found.calibrate is not None else found.train
    if part is None:
        return
    low, high = int(part.images.min()), int(part.images.max())
    if low == high:
        warnings.warn(
            f"all {part.samples} images of {data} for calibration have the value {low} everywhere, from which no "
            "ranges of activations can be learnt",
            InputWarning,
            stacklevel=3,
        )


def check_same_classes(found: Sources, own: tuple[str, ...], name: str, data: str) -> None:
    """Holds the classes of the data against those that a finished file has, which it was trained for.

    Args:
        own: the names of the file's outputs; empty where it has none, and numbers are all there is.
        name: the file.
    Raises:
        DataError: when the data has a class that the file does not know, so that a score would compare other things.
    """
    if not own or not found.labels or found.labels == own:
        return
    strange = [label for label in found.labels if label not in own]
    raise DataError(
        f"{data} has {len(strange)} of its {len(found.labels)} classes that {name} does not know ({listed(strange)}); "
        f"it knows {listed(own)}, so score it on data of these"
    )
