"""Reads and writes the numbers of a model, and refuses what does not fit it.

A file is checked as a whole before one number is copied, so a model is never left half loaded. Files are read by
`checkpoints`, which executes nothing, and what is in them is put under the model's names by `fitting`. Tensors that
share their memory are written once: the file's metadata has an entry "shared", JSON that maps each other name to the
name that is kept.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.atomic import writing
from tersenet.errors import InputWarning, ModelError
from tersenet.models.checkpoints import read_checkpoint
from tersenet.models.fitting import aliases, fitting


class OtherClasses(ModelError):
    """Weights that fit but for their number of classes, which is `classes`."""

    def __init__(self, message: str, classes: int) -> None:
        super().__init__(message)
        self.classes = classes


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copies the numbers of a file into a model, all of them or none.

    Args:
        model: of any device and float type; the numbers are converted to it.
        path: a file for `checkpoints.read_checkpoint`, whose wrappers ({"state_dict": ...}) and prefixes ("module.",
            "model.") are taken off. Where several sets of weights in it fit, an averaged one (EMA) is taken, and it is
            said; "FILE#NAME" takes the one that is called NAME.
    Raises:
        FileError: when the file is missing, of another kind, damaged, or a pickle with code in it.
        ModelError: when names or shapes differ from the model's, or a weight is NaN or infinite.
    """
    path, part = _with_part(os.fspath(path))
    own = model.state_dict()
    state = fitting(read_checkpoint(path), own, path, part)
    _check(state, own, path)
    _say_types(state, own, path)
    # Everything was checked, and the names that are still missing are counters or aliases.
    model.load_state_dict(state, strict=False)


def _with_part(text: str) -> tuple[Path, str]:
    """The file and the name after "#"; a file whose own name has a "#" stays whole."""
    if Path(text).exists() or "#" not in text:
        return Path(text), ""
    name, _, part = text.rpartition("#")
    return Path(name), part


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's numbers as .safetensors: either the whole file is there afterwards, or what was there before.

    Raises:
        TersenetError: when the disk is full or the folder cannot be written.
        ModelError: when an entry of the state dict is no dense tensor with numbers in it.
    """
    from safetensors.torch import save

    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ModelError(
                f"{key} cannot be stored: it is {_describe(value)}, and only dense tensors with numbers can be; "
                "keep it out of the state dict"
            )
    kept = aliases(state)
    tensors = {key: state[key].detach().contiguous() for key in state if key not in kept}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        # What is left can still overlap, as views of one buffer do; safetensors wants each on its own.
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    # One entry at most, because safetensors writes several in any order, and equal numbers should give equal files.
    metadata = {"shared": json.dumps(kept)} if kept else {"format": "pt"}
    with writing(path) as temporary:
        # Not save_file: it reports a full disk as an error of its own.
        temporary.write_bytes(save(tensors, metadata=metadata))


def _other_classes(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> tuple[int, int] | None:
    """The numbers of classes of a file and of the model, where the last layer's outputs are all that differs.

    Only the last layer can have other outputs and leave every other shape as it is.
    """
    wrong = [key for key, value in state.items() if value.shape != own[key].shape]
    if not all(state[key].dim() and own[key].dim() and state[key].shape[1:] == own[key].shape[1:] for key in wrong):
        return None
    sizes = {(len(state[key]), len(own[key])) for key in wrong}
    return next(iter(sizes)) if len(sizes) == 1 else None


def _check(state: Mapping[str, Tensor], own: Mapping[str, Any], path: Path) -> None:
    """Shapes, kinds and values. Raises ModelError at the first that does not fit."""
    wrong = [key for key, value in state.items() if value.shape != own[key].shape]
    if wrong:
        classes = _other_classes(state, own)
        if classes is not None:
            raise OtherClasses(
                f"{path} has {classes[0]} classes and the model has {classes[1]} ({wrong[0]} has shape "
                f"{tuple(state[wrong[0]].shape)} in the file but {tuple(own[wrong[0]].shape)} in the model), and all "
                f"else fits; build the model with {classes[0]} classes",
                classes[0],
            )
        key, rest = wrong[0], len(wrong) - 1
        others = f", and {rest} more differ" if rest else ""
        raise ModelError(
            f"{key} has shape {tuple(state[key].shape)} in {path} but {tuple(own[key].shape)} in the model{others}; "
            "give the weights of this architecture and number of classes"
        )
    for key, value in state.items():
        target = own[key]
        if value.is_floating_point() != target.is_floating_point():
            raise ModelError(
                f"{key} is {_describe(value)} in {path} but {_describe(target)} in the model; give weights that were "
                "saved from this form of the model"
            )
        # Checked in the model's type, because a large float64 becomes infinite in float16.
        if value.is_floating_point() and not torch.isfinite(value.to(target.dtype).float()).all():
            kind = "NaN" if torch.isnan(value.float()).any() else "infinite"
            raise ModelError(f"{key} in {path} has {kind} values in {_describe(target)}; give weights that are finite")


def _say_types(state: Mapping[str, Tensor], own: Mapping[str, Any], path: Path) -> None:
    """Warns where floats are stored in another type than the model computes in."""
    kinds = {
        (str(value.dtype).removeprefix("torch."), str(own[key].dtype).removeprefix("torch."))
        for key, value in state.items()
        if value.is_floating_point() and value.dtype != own[key].dtype
    }
    for stored, computed in sorted(kinds):
        warnings.warn(
            f"the weights in {path} are {stored} and were converted to {computed}", InputWarning, stacklevel=3
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        where = " without numbers (meta)" if value.is_meta else ""
        return f"a {str(value.layout).removeprefix('torch.')} {str(value.dtype).removeprefix('torch.')} tensor{where}"
    return f"of type {type(value).__name__}"
