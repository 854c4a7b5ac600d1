"""From what a user names (a model, data) to a model and a task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tersenet import models
from tersenet.data import open_data
from tersenet.errors import ModelError, SettingsError
from tersenet.graph.trace import trace
from tersenet.models.sources import open_model as open_other
from tersenet.models.weights import load_weights
from tersenet.task import Preparation, Task


def open_model(spec: str, weights: str | Path | None = None, seed: int = 0) -> tuple[nn.Module, Preparation]:
    """A model by name or file, in evaluation mode, and how its inputs are prepared.

    Args:
        spec: a name in tersenet.models ("resnet56"), "timm:NAME", "torchvision:NAME", "package.module:factory",
            FILE.pt2 or FILE.terse.
        weights: .safetensors, or .pt/.pth read without running code from it.
        seed: of the numbers that a model is born with, so that a run that starts from them can be continued.
    Raises:
        ModelError: when there is no such model, or the weights do not fit it.
    """
    if spec.endswith(".onnx"):
        raise ModelError(
            f"{spec} is an ONNX file, which can be measured and scored but not changed; "
            "give the PyTorch model, a .pt2 or a .terse file"
        )
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
    preparation = Preparation.of_metadata(metadata) or Preparation(
        (height, width), (0.5,) * channels, (0.5,) * channels
    )
    if weights is not None:
        load_weights(program, weights)
    # A program knows its operators but not its layers; tracing it brings them back.
    model = trace(program, example_of(preparation))
    model.training = False
    return model, preparation


def example_of(preparation: Preparation) -> torch.Tensor:
    """Two made inputs of the right shape, (2, C, H, W), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, preparation.channels, *preparation.size, generator=generator)


def prepared(
    preparation: Preparation,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: Sequence[int] | None = None,
) -> Preparation:
    """A preparation with some of its parts named by the user.

    Raises:
        SettingsError: when mean and std have different lengths, or a std is not positive.
    """
    preparation = Preparation(
        (size[0], size[1]) if size is not None else preparation.size,
        tuple(mean) if mean is not None else preparation.mean,
        tuple(std) if std is not None else preparation.std,
        preparation.labels,
    )
    if len(preparation.mean) != len(preparation.std):
        raise SettingsError(
            f"mean has {len(preparation.mean)} values and std has {len(preparation.std)}; give one per channel"
        )
    if min(preparation.std) <= 0:
        raise SettingsError(f"std must be positive, got {list(preparation.std)}")
    return preparation


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
        data: "digits", "parquet:DIR", "folder:DIR", "hf:NAME" or "random:3x224x224".
        validate: a held-out set in the same form, for choosing; its test part is used, else all of it.
    Raises:
        DataError: when the data is missing, empty or broken.
    """
    found = open_data(
        data, preparation, batch_size=batch_size, seed=seed, columns=columns, on_bad_image=on_bad_image,
        validate=validate, quiet=quiet,
    )  # fmt: skip
    labels = found.labels or preparation.labels

    def open_named(spec: str) -> nn.Module:
        return _of_same_inputs(spec, preparation)

    def reopen(other: Preparation) -> Task:
        return open_task(
            model, other, data, validate=validate, batch_size=batch_size, seed=seed, columns=columns,
            on_bad_image=on_bad_image, quiet=quiet,
        )  # fmt: skip

    first = found.calibrate if found.calibrate is not None else found.train
    example = example_of(preparation) if first is None else next(iter(first))[0][:2].clone()
    return Task(
        example=example,
        train=found.train,
        calibrate=found.calibrate,
        validate=found.validate,
        test=found.test,
        original=model,
        preparation=dataclasses.replace(preparation, labels=tuple(labels)),
        seed=seed,
        quiet=quiet,
        reopen=reopen,
        open_model=open_named,
    )


def _of_same_inputs(spec: str, preparation: Preparation) -> nn.Module:
    """A model with its weights, by name or file, whose inputs are prepared in this way.

    Raises:
        ModelError: when there is no such model, it has no weights, or its inputs are prepared in another way.
    """
    if is_untrained(spec):
        raise ModelError(f"{spec} is a network without weights, which cannot teach; give a .terse or .pt2 file")
    model, its = open_model(spec)
    for name in ("size", "mean", "std"):
        wanted, found = getattr(preparation, name), getattr(its, name)
        if len(wanted) != len(found) or not all(
            math.isclose(*pair, abs_tol=1e-3) for pair in zip(wanted, found, strict=True)
        ):
            raise ModelError(
                f"{spec} takes inputs of {name} {found}, the model that is trained takes {wanted}; "
                "give a teacher of the same inputs"
            )
    return model
