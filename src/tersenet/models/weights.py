"""Reads and writes the numbers of a model, and refuses what does not fit it.

A file is checked as a whole before one number is copied, so a model is never left half loaded. Pickles are read with
torch's `weights_only`, which executes nothing. Tensors that share their memory are written once: the file's metadata
has an entry "shared", JSON that maps each other name to the name that is kept.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.atomic import writing
from tersenet.errors import FileError, ModelError

# What training scripts put around a state dict, and what DataParallel and torch.compile put before its names.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copies the numbers of a file into a model, all of them or none.

    Args:
        model: of any device and float type; the numbers are converted to it.
        path: .safetensors, or .pt / .pth (read with `weights_only=True`: no code in it is executed). The usual
            wrappers ({"state_dict": ...}, {"model": ...}) and prefixes ("module.") are taken off.
    Raises:
        FileError: when the file is missing, of another kind, damaged, or a pickle with code in it.
        ModelError: when names or shapes differ from the model's, or a weight is NaN or infinite.
    """
    path = Path(path)
    own = model.state_dict()
    state = _fitting_names(_read(path), own, path)
    _check(state, own, path)
    # Everything was checked, and the names that are still missing are counters or aliases.
    model.load_state_dict(state, strict=False)


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
    kept = _aliases(state)
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


def _aliases(state: Mapping[str, Any]) -> dict[str, str]:
    """Each name whose tensor is the very memory of an earlier one, with that earlier name."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 0 or value.is_meta:
            continue
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if place in first:
            found[key] = first[place]
        else:
            first[place] = key
    return found


def _read(path: Path) -> Mapping[str, Any]:
    """The state dict in a file, without its wrappers; names as they are in the file."""
    kind = path.suffix.lower()
    if kind not in (".safetensors", ".pt", ".pth"):
        raise FileError(f"weights cannot be read from {path}: give a .safetensors file, or a state dict in .pt or .pth")
    if not path.is_file():
        raise FileError(f"there is no weights file {path}; give the path of a .safetensors, .pt or .pth file")
    state: Any = _read_safetensors(path) if kind == ".safetensors" else _read_pickle(path)
    while isinstance(state, Mapping):
        wrapper = next((key for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if wrapper is None:
            break
        state = state[wrapper]
    if not isinstance(state, Mapping):
        raise ModelError(
            f"{path} holds {_describe(state)} and no state dict; write it with "
            "safetensors.torch.save_file(model.state_dict(), ...)"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{path} is no state dict: its entry {key!r} is {_describe(value)}, and every entry must be a tensor; "
                "save model.state_dict() alone, or under the key 'state_dict'"
            )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            shared = json.loads((file.metadata() or {}).get("shared", "{}"))
            return state | {alias: state[kept] for alias, kept in shared.items()}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise FileError(f"{path} is damaged or no safetensors file ({error}); copy or download it again") from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol, which says nothing to our users
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        said = str(error)
        # torch names the global that it met, except in pickles of newer protocols.
        named = re.search(r"GLOBAL ([\w.]*\w)", said)
        if named is None and not zipfile.is_zipfile(path) and not _is_pickle(path):
            raise FileError(f"{path} is damaged or no file of torch.save; copy or download it again") from error
        raise FileError(
            f"{path} was refused and nothing in it was executed: it is a pickle that calls "
            f"{named[1] if named else 'code'}, and only tensors are read; write the weights with "
            "safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error
    except Exception as error:
        # A damaged file makes torch.load raise nearly anything; the first sentence of what it said is enough.
        said = re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__
        raise FileError(f"{path} is damaged or no file of torch.save ({said}); copy or download it again") from error


def _is_pickle(path: Path) -> bool:
    """Whether the file reads as pickle instructions up to the end; they are only listed, not followed."""
    try:
        return any(instruction.name == "STOP" for instruction, _, _ in pickletools.genops(path.read_bytes()))
    except Exception:  # noqa: BLE001 - pickletools raises many kinds on what is no pickle
        return False


def _fitting_names(state: Mapping[str, Tensor], own: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The state dict under the model's names. Raises ModelError when the names are not the model's."""
    fitting = dict(state)
    for prefix in _PREFIXES * 2:  # either may be outside of the other
        if (
            fitting
            and all(key.startswith(prefix) for key in fitting)
            and not any(key.startswith(prefix) for key in own)
        ):
            fitting = {key.removeprefix(prefix): value for key, value in fitting.items()}
    same = _aliases(own)
    groups: dict[str, list[str]] = {}
    for key in own:
        groups.setdefault(same.get(key, key), []).append(key)
    present = {kept for kept, group in groups.items() if any(key in fitting for key in group)}
    missing = [
        key
        for key in own
        # The count of batches is not part of older files, and only matters to norms without a momentum.
        if key not in fitting and same.get(key, key) not in present and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in fitting if key not in own]
    if missing or unexpected:
        parts = [f"missing {_first(missing)}"] if missing else []
        parts += [f"unexpected {_first(unexpected)}"] if unexpected else []
        raise ModelError(
            f"the weights in {path} are not this model's: {'; '.join(parts)}; give the weights of this architecture"
        )
    return fitting


def _check(state: Mapping[str, Tensor], own: Mapping[str, Any], path: Path) -> None:
    """Shapes, kinds and values. Raises ModelError at the first that does not fit."""
    wrong = [key for key, value in state.items() if value.shape != own[key].shape]
    if wrong:
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


def _first(keys: Iterable[str], count: int = 3) -> str:
    keys = list(keys)
    rest = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + rest


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        where = " without numbers (meta)" if value.is_meta else ""
        return f"a {str(value.layout).removeprefix('torch.')} {str(value.dtype).removeprefix('torch.')} tensor{where}"
    return f"of type {type(value).__name__}"
