"""`Rewind`: surviving weights go back to earlier ones. `KeepEarly`: the companion that writes those down.

The lottery ticket hypothesis: Frankle & Carbin, arXiv:1803.03635 (back to the first weights); late rewinding, to those
after a small share of the training: Frankle et al., arXiv:1903.01611, without which deep networks lose. Both rewind
everything that is trained, norms and biases too, and what they keep is the mask. Rewinding only the learning rate
(Renda et al., arXiv:2003.02389) needs no step: it is a `train` with the whole schedule.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tersenet.atomic import writing
from tersenet.bricks.brick import Brick
from tersenet.bricks.quantized import QuantizedLayer
from tersenet.bricks.quantizer import Quantizer
from tersenet.errors import FileError, ModelError, SettingsError
from tersenet.step import Companion, Step
from tersenet.task import Task

_PROGRESS, _AT = "tersenet.progress", "tersenet.at"


@dataclass(frozen=True, kw_only=True)
class Rewind(Step):
    """Puts weights, norms and biases back to earlier values; masks stay, so what they cut off stays off.

    Layers must have the shapes that they had then: masks can be rewound under, cut channels cannot.

    Args:
        to: "original", the model as the run got it, or a .safetensors file such as `keep_early` writes: in the folder
            of this run, else relative to the working folder.
        only: rewind only layers that match.
        skip: leave layers that match as they are.
    """

    several_inputs: ClassVar[bool] = True
    family: ClassVar[str] = "prune"
    summary: ClassVar[str] = "puts surviving weights back to earlier ones and keeps the masks (lottery tickets)"
    serves: ClassVar[tuple[str, ...]] = ("any layer with parameters",)
    changes_structure: ClassVar[bool] = False

    to: str = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to != "original" and not self.to.endswith(".safetensors"):
            raise SettingsError(f"to must be 'original' or a .safetensors file, got {self.to!r}; see keep_early")

    def fit(self, model: nn.Module, task: Task) -> None:
        """Copies the earlier numbers in, all of them or none.

        Raises:
            FileError: when the file is not there, or damaged.
            ModelError: when the earlier weights are of other layers or shapes.
        """
        early = _plain(self._early(task))
        wanted = {
            name: (plain, value)
            for name, (plain, value) in _places(model).items()
            if self._touches(model, name) and not (plain not in early and _is_of_a_brick(model, name))
        }
        for name, (plain, value) in wanted.items():
            found = early.get(plain)
            if found is None or found.shape != value.shape or found.is_floating_point() != value.is_floating_point():
                was = "are not there" if found is None else f"have shape {tuple(found.shape)}, {found.dtype}"
                raise ModelError(
                    f"{name} has shape {tuple(value.shape)}, {value.dtype}, but in {self.to} its weights {was}; rewind "
                    "before channels are cut, layers replaced or norms folded, or skip this layer"
                )
        with torch.no_grad():
            for plain, value in wanted.values():
                value.copy_(early[plain])

    def _early(self, task: Task) -> dict[str, Tensor]:
        if self.to != "original":
            own = None if task.run_folder is None else task.run_folder / self.to
            return _read(own if own is not None and own.is_file() else Path(self.to))
        if task.original is None:
            raise SettingsError("there is no original model (task.original is None); give it, or a file in to")
        return dict(task.original.state_dict())

    def _touches(self, model: nn.Module, name: str) -> bool:
        layer = re.sub(r"(^|\.)parametrizations\..*$", "", name.rpartition(".")[0])
        return self.matches(layer, model.get_submodule(layer))


@dataclass(frozen=True, kw_only=True)
class KeepEarly(Companion):
    """Writes the weights after a share of the training, for `rewind` to go back to.

    The file is there from the first batch on, with the weights of the start, and is replaced at `at`: a training that
    is cut and goes on so knows whether it is still to be done. A new training writes over an old file.

    Args:
        at: share of the training, 0 (its start) to below 1; 1 to 5 % are usual.
        path: of the .safetensors file, relative to the folder of the run; where nothing is kept, to the working folder.
    """

    summary: ClassVar[str] = "writes the weights after a share of the training, for rewind (late rewinding, 2019)"

    at: float = 0.02
    path: str = "early.safetensors"

    @property
    def trades(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not 0 <= self.at < 1:
            raise SettingsError(f"at must be in [0, 1), the share of the training, got {self.at}; 0.02 is usual")
        if not self.path.endswith(".safetensors"):
            raise SettingsError(f"path must end in .safetensors, got {self.path!r}; such as early.safetensors")

    def placed(self, task: Task) -> KeepEarly:
        """An absolute path stays what it is."""
        return self if task.run_folder is None else dataclasses.replace(self, path=str(task.run_folder / self.path))

    def tick(self, model: nn.Module, progress: float) -> None:
        """Writes at the start and at `at`; in a training by several processes the first one does.

        Raises:
            FileError: when the file is gone, or no longer ours, in a training that has passed `at` or goes on.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        path = Path(self.path)
        if progress == 0 or (progress >= self.at and _progress(path) < self.at):
            numbers = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
            with writing(path) as temporary:
                temporary.write_bytes(save(numbers, metadata={_PROGRESS: repr(progress), _AT: repr(self.at)}))


def _places(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Name in the state dict -> (name without parametrizations, tensor), of all that an early file must hold.

    The scales of a quantized layer are no part of it: they belong to the rounding, which stays as masks do.
    """
    scales = {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLayer | Quantizer)
        for name, _ in module.named_buffers(recurse=False)
    }
    return {
        name: (_plain_name(name), value)
        for name, value in model.state_dict(keep_vars=True).items()
        if not _is_attached(name) and name not in scales
    }


def _is_of_a_brick(model: nn.Module, name: str) -> bool:
    """Whether a number is one that only a method's own layer has, such as a learned step: it stays as masks do."""
    layer, _, own = name.rpartition(".")
    return isinstance(model.get_submodule(layer), Brick) and own not in ("weight", "bias")


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names that it has without parametrizations; what those hold of their own is left out."""
    return {_plain_name(name): value for name, value in state.items() if not _is_attached(name)}


def _plain_name(name: str) -> str:
    """
    >>> _plain_name("conv1.parametrizations.weight.original")
    'conv1.weight'
    """
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", name)


def _is_attached(name: str) -> bool:
    """Whether a number belongs to a parametrization, such as a mask, and not to the layer.

    >>> _is_attached("conv1.parametrizations.weight.0.mask"), _is_attached("conv1.weight")
    (True, False)
    """
    return re.search(r"(^|\.)parametrizations\.\w+\.\d+\.", name) is not None


def _read(path: Path) -> dict[str, Tensor]:
    """The weights in a file. Raises FileError, also where its training was cut before it came as far as it should."""
    with _opened(path) as file:
        said = file.metadata() or {}
        if _AT in said and float(said[_PROGRESS]) < float(said[_AT]):
            raise FileError(
                f"{path} holds the weights of the start, because its training never came as far as {said[_AT]}; "
                "let it go on, or give keep_early a smaller at"
            )
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary


def _progress(path: Path) -> float:
    """The share of the training after which a file of `KeepEarly` was written. Raises FileError."""
    with _opened(path) as file:
        said = (file.metadata() or {}).get(_PROGRESS)
    if said is None:
        raise FileError(f"{path} is no file of keep_early; give it another path, or delete this file and train anew")
    return float(said)


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise FileError(f"there is no file {path} with early weights; train with keep_early to write it")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged and cannot be read ({error}); write it again with keep_early") from error
