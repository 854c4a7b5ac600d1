"""From what a user names (a model, data) to a model and a task."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersenet import models
from tersenet.bricks.evaluating import evaluating
from tersenet.data import open_data
from tersenet.data.checks import check_calibration, check_classes, outputs_of
from tersenet.data.classes import is_counted, listed
from tersenet.errors import ModelError
from tersenet.graph.trace import trace
from tersenet.models.sources import open_model as open_other
from tersenet.models.weights import load_weights
from tersenet.preparations import chosen_preparation
from tersenet.task import Preparation, Task


def open_model(
    spec: str, weights: str | Path | None = None, seed: int = 0, image_size: Sequence[int] | None = None
) -> tuple[nn.Module, Preparation]:
    """A model by name or file, in evaluation mode, and how its inputs are prepared.

    Args:
        spec: a name in tersenet.models ("resnet56"), "timm:NAME", "torchvision:NAME", "package.module:factory",
            FILE.pt2, FILE.terse or FILE.onnx (float).
        weights: .safetensors, or .pt/.pth read without running code from it.
        seed: of the numbers that a model is born with, so that a run that starts from them can be continued.
        image_size: (H, W), for an ONNX file that takes images of any size.
    Raises:
        ModelError: when there is no such model, or the weights do not fit it.
    """
    if spec.endswith(".onnx"):
        return _open_onnx(Path(spec), weights, image_size)
    if spec.endswith(".terse"):
        from tersenet.deploy.artifact import load_terse, terse_preparation

        if weights is not None:
            raise ModelError(f"{spec} holds its own weights; leave --weights out")
        return load_terse(Path(spec)).eval(), terse_preparation(Path(spec))
    if spec.endswith(".pt2"):
        return _open_program(Path(spec), weights)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        model, preparation = open_other(spec, weights)
    return model.eval(), preparation


def _open_onnx(
    path: Path, weights: str | Path | None, image_size: Sequence[int] | None
) -> tuple[nn.Module, Preparation]:
    from tersenet.onnx_import import open_onnx

    if weights is not None:
        raise ModelError(f"{path} holds its own weights; leave --weights out")
    model, preparation = open_onnx(path, image_size)
    if preparation is None:
        inputs: Any = model.inputs
        listed = ", ".join(f"{each.name} of {each.said}" for each in inputs)
        raise ModelError(f"{path} takes {listed}; models of one input, images (N, C, H, W), are supported here")
    return model, preparation


def is_untrained(spec: str, weights: str | Path | None = None) -> bool:
    """Whether this names an architecture with random numbers; of the user's own code it cannot be known."""
    named = spec in models.REFERENCES or (spec.startswith(("timm:", "torchvision:")) and "." not in spec)
    return named and weights is None


def _open_program(path: Path, weights: str | Path | None) -> tuple[nn.Module, Preparation]:
    """An exported program, read without running code from it; a file that is not ours does not say its mean and std."""
    from tersenet.deploy.pt2 import read_pt2

    program, shape, metadata = read_pt2(path)
    if len(shape) != 4 or None in shape[1:]:
        raise ModelError(
            f"{path} takes inputs of shape {shape}; models of images (N, C, H, W) of one size are supported"
        )
    channels, height, width = (int(size) for size in shape[1:] if size is not None)
    preparation = Preparation.of_metadata(metadata) or dataclasses.replace(
        Preparation.unknown((height, width), channels), assumed=("mean", "std")
    )
    if weights is not None:
        load_weights(program, weights)
    # A program knows its operators but not its layers; tracing it brings them back.
    inputs: Any = program.inputs
    model = trace(program, example_for(program, preparation) if len(inputs) > 1 else example_of(preparation))
    model.training = False
    model.inputs = inputs
    return model, preparation


def example_of(preparation: Preparation) -> torch.Tensor:
    """Two made inputs of the right shape, (2, C, H, W), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, preparation.channels, *preparation.size, generator=generator)


def input_names(model: nn.Module) -> list[str]:
    """What a model must be called with: inputs of the file that it was read from, else what its forward asks for."""
    known: Any = getattr(model, "inputs", ())
    if known:
        return [each.name for each in known]
    try:
        asked = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code may not say
        return []
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in asked if each.kind in by_place and each.default is inspect.Parameter.empty]


def takes_image(model: nn.Module) -> bool:
    """Whether a model that was read from a file takes one input, floats (N, C, H, W)."""
    inputs: Any = getattr(model, "inputs", ())
    return [(len(each.shape), str(each.dtype).startswith("float")) for each in inputs] == [(4, True)]


def example_for(model: nn.Module, preparation: Preparation | None) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Two made samples: images, or what the file that the model was read from says it takes instead.

    Raises:
        ModelError: when the model has no file that says what it takes, and takes several inputs.
    """
    if hasattr(model, "inputs") and not takes_image(model):
        from tersenet.deploy.made_inputs import made_example

        return made_example(model, type(model).__name__)
    if len(names := input_names(model)) > 1:
        raise ModelError(
            f"{type(model).__name__} takes {len(names)} inputs ({', '.join(names)}), and code does not say of which "
            "shapes; give a .terse or .pt2 file of it, which does"
        )
    assert preparation is not None
    return example_of(preparation)


def _check_takes_images(model: nn.Module, data: str) -> None:
    """Raises ModelError where a model cannot be called with one input, images."""
    names = input_names(model)
    if len(names) > 1:
        what = f"{len(names)} inputs ({', '.join(names)})"
    elif hasattr(model, "inputs") and not takes_image(model):
        (only,) = model.inputs  # type: ignore[misc]
        what = f"an input {only.said} of {only.dtype}"
    else:
        return
    raise ModelError(
        f"the model takes {what}, and {data} gives one input, images; use the model in Python, where a Task has an "
        "example and data of any inputs"
    )


def open_task(
    model: nn.Module,
    preparation: Preparation,
    data: str,
    *,
    validate: str | None = None,
    batch_size: int = 128,
    seed: int = 0,
    columns: tuple[str, str] | None = None,
    on_bad_image: str = "stop",
    quiet: bool = False,
) -> Task:
    """The task of a model on named data.

    Args:
        preparation: how its images become inputs; what is only assumed is chosen by trial, and warned of
            (preparations.py).
        data: "digits", "parquet:DIR", "folder:DIR", "hf:NAME" or "random:3x224x224".
        validate: a held-out set in the same form, for choosing; its test part is used, else all of it.
    Raises:
        DataError: when the data is missing, empty or broken.
        ModelError: when the model takes something else than one input, images.
    """
    _check_takes_images(model, data)
    if preparation.assumed:
        preparation = chosen_preparation(_answers(model), preparation, data, columns)
    found = open_data(
        data, preparation, batch_size=batch_size, seed=seed, columns=columns, on_bad_image=on_bad_image,
        validate=validate, quiet=quiet,
    )  # fmt: skip
    preparation = dataclasses.replace(preparation, labels=found.labels or preparation.labels)

    def open_named(spec: str) -> nn.Module:
        return _of_same_inputs(spec, preparation)

    def reopen(other: Preparation) -> Task:
        return open_task(
            model, dataclasses.replace(other, assumed=()), data, validate=validate, batch_size=batch_size, seed=seed,
            columns=columns, on_bad_image=on_bad_image, quiet=quiet,
        )  # fmt: skip

    first = found.calibrate if found.calibrate is not None else found.train
    example = example_of(preparation) if first is None else next(iter(first))[0][:2].clone()
    if len(example) == 1:  # of a single image, while a batch must not look like a fixed size
        example = example.repeat(2, 1, 1, 1)
    check_classes(found, outputs_of(model, example), data)
    check_calibration(found, data)
    return Task(
        example=example,
        train=found.train,
        calibrate=found.calibrate,
        validate=found.validate,
        test=found.test,
        original=model,
        preparation=preparation,
        seed=seed,
        quiet=quiet,
        reopen=reopen,
        open_model=open_named,
    )


def _answers(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    """The model in evaluation mode, as a function of images."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def answers(x: torch.Tensor) -> Any:
        with evaluating(model), torch.inference_mode():
            return model(x.to(device))

    return answers


def _of_same_inputs(spec: str, preparation: Preparation) -> nn.Module:
    """A model with its weights, by name or file, whose inputs are prepared in this way.

    Raises:
        ModelError: when there is no such model, it has no weights, or its inputs are prepared in another way.
    """
    if is_untrained(spec):
        raise ModelError(f"{spec} is a network without weights, which cannot teach; give a .terse or .pt2 file")
    model, its = open_model(spec, image_size=preparation.size)
    for name in [each for each in ("size", "mean", "std") if each not in its.assumed]:
        wanted, found = getattr(preparation, name), getattr(its, name)
        if len(wanted) != len(found) or not all(
            math.isclose(*pair, abs_tol=1e-3) for pair in zip(wanted, found, strict=True)
        ):
            raise ModelError(
                f"{spec} takes inputs of {name} {found}, the model that is trained takes {wanted}; "
                "give a teacher of the same inputs"
            )
    if its.labels and preparation.labels and its.labels != preparation.labels and not is_counted(its.labels):
        raise ModelError(
            f"{spec} has the classes {listed(its.labels)}, the data has {listed(preparation.labels)}, so that its "
            "outputs mean something else; give a teacher of the same classes in the same order"
        )
    return model
