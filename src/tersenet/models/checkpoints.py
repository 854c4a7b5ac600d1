"""Reads the files in which people keep weights, without executing anything in them.

What a training script saves is seldom a bare state dict: the weights stand beside an optimizer's state and
hyperparameters, several times over (as they are trained, and averaged), under the names that the script, DataParallel,
torch.compile or Lightning gave them. Here such a file becomes the sets of tensors in it, each with the place where it
was found; `weights` picks the set that fits a model.

Pickles are read by torch's `weights_only`; the classes of hyperparameters are put in place of by an inert class, so
that they are read over and never imported. TorchScript is read from its archive the same way, and never compiled.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersenet.errors import FileError, ModelError

KINDS = ".safetensors, .pt, .pth, .pth.tar, .ckpt, .bin, or the .index.json of several"
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".pkl")
# Files that hold a whole model, and so are opened as one.
_MODELS = {
    ".pt2": "an exported program, which is opened as the model itself: give it in place of the model's name",
    ".terse": "a whole model, which is opened as such: give it in place of the model's name",
    ".onnx": "an ONNX file, whose weights have no names of layers; give the checkpoint that it was made from",
}
# Hyperparameters come as objects of these packages, which are read over. Nothing in them holds weights.
_READ_OVER = (
    "argparse", "pathlib", "datetime", "enum", "typing", "uuid", "numpy", "omegaconf", "yacs", "addict", "easydict",
    "ml_collections", "mmcv", "mmengine", "hydra", "lightning", "pytorch_lightning", "lightning_fabric",
    "lightning_utilities", "collections", "torch.optim", "torch.torch_version", "timm.utils",
    "transformers.training_args", "transformers.trainer_utils",
)  # fmt: skip
_PLAIN = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "set",
          "slice", "str", "tuple")  # fmt: skip
_NEVER = ("getattr", "eval", "exec", "open", "system", "touch")
# Parts of a checkpoint that hold numbers of the training and not of the model.
_TRAINING = re.compile(r"optim|sched|scaler|callbacks|loops|hyper_parameters|^args$|^config$|rng_state")
_DEPTH = 5
_MARK = "inert "  # before the name of a class that is read over
_STORAGES = {
    "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "IntStorage": torch.int32, "LongStorage": torch.int64, "ShortStorage": torch.int16,
}  # fmt: skip


@dataclass(frozen=True)
class WeightSet:
    """Tensors by name, as one mapping in a file holds them.

    Args:
        place: the keys that lead there, with dots; empty for the whole file.
        tensors: by the names that the file has for them.
        others: what stands among them and is neither a tensor nor a mapping.
        program: whether they come from TorchScript, which keeps tensors that are in no state dict.
    """

    place: str
    tensors: Mapping[str, Tensor]
    others: Mapping[str, Any]
    program: bool = False


class _Inert:
    """Stands for an object of a class that is not imported; takes whatever is put into it and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _Table:
    """Stands for a class of mappings, which torch fills only where they are plain dicts."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return {}


class _Script(dict):
    """A module of a TorchScript archive: its attributes by name."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update(state)


def read_checkpoint(path: Path) -> list[WeightSet]:
    """All sets of tensors in a file, the outer ones first.

    Raises:
        FileError: when the file is missing, of another kind, damaged, or a pickle with code in it.
        ModelError: when it holds no tensors by name.
    """
    kind = path.suffix.lower()
    if kind in _MODELS and path.is_file():
        raise FileError(f"{path} is {_MODELS[kind]}")
    index = path.name.lower().endswith(".index.json")
    if kind not in (".safetensors", *_PICKLES) and not index:
        raise FileError(f"weights cannot be read from {path}: give a file of weights ({KINDS})")
    if not path.is_file():
        raise FileError(f"there is no weights file {path}; give the path of a file ({KINDS})")
    if path.stat().st_size == 0:
        raise FileError(f"{path} is damaged or no weights file (0 bytes); copy or download it again")
    if index:
        return [WeightSet("", _shards(path), {})]
    if kind == ".safetensors":
        return [WeightSet("", _read_safetensors(path), {})]
    if _is_script(path):
        return [WeightSet("", _read_script(path), {}, program=True)]
    content = _read_pickle(path)
    if isinstance(content, _Inert) or not isinstance(content, Mapping):
        raise ModelError(
            f"{path} holds {_kind(content)} and no state dict; write it with "
            "safetensors.torch.save_file(model.state_dict(), ...)"
        )
    sets = _sets(content, "", 0)
    if not sets:
        # Whatever is wrong with it is said of the largest mapping: usually one entry is of the wrong type.
        key, value = next(iter(content.items()), ("", None))
        if value is None:
            return [WeightSet("", {}, {})]
        raise ModelError(
            f"{path} is no state dict: its entry {key!r} is {_kind(value)}, and every entry must be a tensor; "
            "save model.state_dict() alone, or under the key 'state_dict'"
        )
    return sets


def _sets(content: Mapping[Any, Any], place: str, depth: int) -> list[WeightSet]:
    """The mappings in a mapping that hold tensors under names."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    inner = []
    for key, value in content.items():
        if isinstance(value, Mapping) and depth < _DEPTH and not _TRAINING.search(str(key).lower()):
            inner += _sets(value, f"{place}.{key}" if place else str(key), depth + 1)
    if not tensors:
        return inner
    others = {str(key): value for key, value in content.items() if not isinstance(value, Tensor | Mapping)}
    return [WeightSet(place, tensors, others), *inner]


def _shards(path: Path) -> dict[str, Tensor]:
    """The tensors of several files, as an index of the kind that Hugging Face writes names them."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(files.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is no index of weights (a 'weight_map' from names to files): {error!r}") from error
    found: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise FileError(f"{path} names the file {name!r}; every file must lie beside the index")
        for part in read_checkpoint(path.parent / name):
            found.update(part.tensors)
    lacking = [key for key in files if key not in found]
    if lacking:
        raise FileError(f"{path} names {lacking[0]}, which is not in {files[lacking[0]]}; copy or download them again")
    return found


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
    """What torch.save wrote. Classes of hyperparameters become inert, one after the other, as the reader meets them."""
    inert: dict[str, Any] = {}
    while True:
        try:
            stubs: list[Any] = [(stub, name) for name, stub in inert.items()]
            with warnings.catch_warnings(), torch.serialization.safe_globals(stubs):
                warnings.simplefilter("ignore")  # about the pickle protocol, which says nothing to our users
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            said = str(error)
            # torch names the global that it met, except in pickles of newer protocols.
            named = re.search(r"GLOBAL ([\w.]*\w)", said)
            if named is not None and named[1] not in inert and _is_read_over(named[1]):
                stub = type(f"{_MARK}{named[1]}", (_Inert,), {})
                # torch leaves the module of built-in types out of its message.
                spellings = (
                    (named[1],) if "." in named[1] else (named[1], f"builtins.{named[1]}", f"__builtin__.{named[1]}")
                )
                inert.update(dict.fromkeys(spellings, stub))
                continue
            filled = re.search(rf"Can only SETITEMS?\b.*{_MARK}([\w.]+)", said)
            if filled is not None:
                inert[filled[1]] = type("_Table", (_Table,), {})
                continue
            if named is None and not zipfile.is_zipfile(path) and not _is_pickle(path):
                raise FileError(f"{path} is damaged or no file of torch.save; copy or download it again") from error
            raise FileError(
                f"{path} was refused and nothing in it was executed: it is a pickle that calls "
                f"{named[1] if named else 'code'}, and only tensors are read (a whole model that was pickled is code); "
                "write the weights with safetensors.torch.save_file(model.state_dict(), ...)"
            ) from error
        except Exception as error:
            # A damaged file makes torch.load raise nearly anything; the first sentence of what it said is enough.
            said = re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__
            raise FileError(
                f"{path} is damaged or no file of torch.save ({said}); copy or download it again"
            ) from error


def _is_read_over(name: str) -> bool:
    """Whether this is a class of hyperparameters, by its package; never a function that reaches for something."""
    if name.rpartition(".")[0] in ("", "builtins", "__builtin__"):
        return name.rpartition(".")[2] in _PLAIN
    package = any(name == each or name.startswith(each + ".") for each in _READ_OVER)
    return package and name.rpartition(".")[2] not in _NEVER


def _is_pickle(path: Path) -> bool:
    """Whether the file reads as pickle instructions up to the end; they are only listed, not followed."""
    try:
        return any(instruction.name == "STOP" for instruction, _, _ in pickletools.genops(path.read_bytes()))
    except Exception:  # noqa: BLE001 - pickletools raises many kinds on what is no pickle
        return False


def _is_script(path: Path) -> bool:
    """Whether this is an archive of torch.jit.save, which alone holds constants beside its data."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


class _ScriptReader(pickle.Unpickler):
    """Reads the data of a TorchScript archive: tensors, and modules as plain mappings. Calls nothing of the archive."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module.split(".")[0] == "__torch__":
            return _Script
        if module == "torch.jit._pickle":
            return _Inert
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage as a flat tensor."""
        _, dtype, key, _, count = pid
        data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _rebuilt(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _read_script(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers in a TorchScript archive, by the names that they have in a state dict."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).split("/")[0]
            content = _ScriptReader(archive, root).load()
    except pickle.UnpicklingError as error:
        raise FileError(
            f"{path} was refused and nothing in it was executed: it is TorchScript that needs {error}"
        ) from (error)
    except Exception as error:
        raise FileError(f"{path} is a damaged TorchScript archive ({error}); copy or download it again") from error
    found: dict[str, Tensor] = {}

    def walk(module: Mapping[str, Any], prefix: str) -> None:
        for name, value in module.items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, _Script):
                walk(value, f"{prefix}{name}.")

    walk(content if isinstance(content, _Script) else {}, "")
    if not found:
        raise ModelError(
            f"{path} is a TorchScript program without weights by name; give the checkpoint it was made from"
        )
    return found


def _kind(value: Any) -> str:
    if isinstance(value, _Inert):
        return "a pickled object"
    return f"of type {type(value).__name__}"
