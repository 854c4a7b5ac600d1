"""Takes channels out of layers, in a transaction: either the whole cut succeeds, or the model is as it was.

A cut is plain JSON, {layer path: {role: kept indices}}. Roles: "out" and "in" of convolutions and linear layers,
"channel" of layers that treat every channel alone (norms, PReLU, depthwise convolutions), "pad" of shortcuts that add
channels of zeros (the zeros before, then those after), and "dim0", "dim1" and so on of parameters and buffers that no
layer owns, whose path then takes the layer's place. A mask is cut with the weight under it. Layers are known by their
attributes and not by their class, so bricks that look like a convolution are cut like one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersenet.bricks.mask import Mask
from tersenet.errors import SurgeryError

Cut = Mapping[str, Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class Axis:
    """One direction in which a layer can be made smaller.

    Args:
        size: number of positions.
        tensors: name -> dimension that is sliced.
        attributes: name -> how many of its units one position stands for.
        groups: the positions fall into this many equal runs, which must keep the same places.
        shared: a sliced dimension holds one run only (the inputs of a grouped convolution).
        repeat: how many places of a sliced dimension one position stands for (depthwise with a multiplier).
    """

    size: int
    tensors: Mapping[str, int] = field(default_factory=dict)
    attributes: Mapping[str, int] = field(default_factory=dict)
    groups: int = 1
    shared: bool = False
    repeat: int = 1

    def places(self, kept: Tensor) -> Tensor:
        """Positions -> places in a sliced dimension."""
        if self.shared:
            kept = kept[kept < self.size // self.groups]
        if self.repeat > 1:
            kept = (kept[:, None] * self.repeat + torch.arange(self.repeat)).flatten()
        return kept


def axes(module: Any) -> dict[str, Axis]:
    """role -> axis of a layer; {} when it is of no kind that can be cut."""
    if not _only_masks(module) or any(
        child.state_dict() for name, child in module.named_children() if name != "parametrizations"
    ):
        return {}  # children without numbers, such as the activation inside of timm's norms, are no hindrance
    if all(hasattr(module, name) for name in ("in_channels", "out_channels", "groups", "weight")):
        found = _convolution(module)
    elif all(hasattr(module, name) for name in ("in_features", "out_features", "weight")):
        found = {
            "out": Axis(module.out_features, {"weight": 0, "bias": 0}, {"out_features": 1}),
            "in": Axis(module.in_features, {"weight": 1}, {"in_features": 1}),
        }
    elif hasattr(module, "num_groups") and hasattr(module, "num_channels"):
        size = module.num_channels
        alone = module.num_groups == size  # every channel is its own group, as in an instance norm
        attributes = {"num_channels": 1, "num_groups": 1} if alone else {"num_channels": 1}
        groups = 1 if alone else module.num_groups
        found = {"channel": Axis(size, {"weight": 0, "bias": 0}, attributes, groups)}
    elif hasattr(module, "num_features"):
        names = ("weight", "bias", "running_mean", "running_var")
        found = {"channel": Axis(module.num_features, dict.fromkeys(names, 0), {"num_features": 1})}
    elif hasattr(module, "normalized_shape"):
        if len(module.normalized_shape) != 1:
            return {}
        found = {"channel": Axis(module.normalized_shape[0], {"weight": 0, "bias": 0}, {"normalized_shape": 1})}
    elif hasattr(module, "num_parameters"):
        found = {"channel": Axis(module.num_parameters, {"weight": 0}, {"num_parameters": 1})}
    elif isinstance(getattr(module, "before", None), int) and isinstance(getattr(module, "after", None), int):
        found = {"pad": Axis(module.before + module.after)}
    else:
        return {}
    return _with_others(module, found)


def _only_masks(module: Any) -> bool:
    """Whether nothing but masks stands between a layer's numbers and what it computes with."""
    if not parametrize.is_parametrized(module):
        return True
    return all(isinstance(one, Mask) for chain in module.parametrizations.values() for one in chain)


def _convolution(module: Any) -> dict[str, Axis]:
    rows, columns = (1, 0) if getattr(module, "transposed", False) else (0, 1)
    groups, inputs, outputs = module.groups, module.in_channels, module.out_channels
    if groups > 1 and groups == inputs:  # one channel is no depthwise convolution: its output does not follow its input
        repeat = outputs // inputs
        if rows == 1:  # transposed weights are (I, O / groups, ...)
            if repeat > 1:
                return {}  # its bias is laid out by output and its weight by input
            return {"channel": Axis(inputs, {"weight": 0, "bias": 0}, _depthwise_attributes(repeat))}
        return {"channel": Axis(inputs, {"weight": 0, "bias": 0}, _depthwise_attributes(repeat), repeat=repeat)}
    out = Axis(outputs, {"weight": 0, "bias": 0}, {"out_channels": 1}, groups)
    into = Axis(inputs, {"weight": 1}, {"in_channels": 1}, groups, shared=groups > 1)
    if rows == 1:
        out = Axis(outputs, {"weight": 1, "bias": 0}, {"out_channels": 1}, groups, shared=groups > 1)
        into = Axis(inputs, {"weight": columns}, {"in_channels": 1}, groups)
    return {"out": out, "in": into}


def _depthwise_attributes(repeat: int) -> dict[str, int]:
    return {"in_channels": 1, "groups": 1, "out_channels": repeat}


def _with_others(module: nn.Module, found: dict[str, Axis]) -> dict[str, Axis]:
    """Adds a brick's further tensors: one value per output is sliced with the outputs, anything bigger forbids cuts."""
    known = {name for axis in found.values() for name in axis.tensors}
    role = "out" if "out" in found else next(iter(found))
    axis = found[role]
    length = axis.size * axis.repeat
    extra: dict[str, int] = {}
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name in known or tensor.numel() == 1:
            continue
        if tensor.shape[0] != length or tensor.numel() != length or axis.shared:
            return {}
        extra[name] = 0
    for other in found.values():  # a packed or reshaped weight is not cut by its looks
        for name, dim in other.tensors.items():
            value = getattr(module, name, None)
            size = other.size * other.repeat // (other.groups if other.shared and name == "weight" else 1)
            if isinstance(value, Tensor) and (value.dim() <= dim or value.shape[dim] != size):
                return {}
    if extra:
        found[role] = Axis(axis.size, {**axis.tensors, **extra}, axis.attributes, axis.groups, axis.shared, axis.repeat)
    return found


def cut(model: nn.Module, kept: Cut, example: Tensor | None = None) -> nn.Module:
    """Keeps these indices of these layers, in place.

    Args:
        kept: {layer path: {role: indices}}, each ascending and without repetition.
        example: an input to try the cut model with; without it every layer is checked by itself only.
    Raises:
        SurgeryError: when an index list does not fit its layer, or the cut model does not run on the example as
            before; names the layer and its operator, and the model is as it was.
    """
    made: dict[int, nn.Parameter] = {}
    edits = [edit for path, roles in kept.items() for edit in _edits(model, path, roles, made)]
    before = _shape(model, example) if example is not None else None
    undo: list[tuple[Any, str, Any]] = []
    try:
        for place, name, value in edits:
            undo.append((place, name, _get(place, name)))
            _set(place, name, value)
        if example is not None and (after := _shape(model, example)) != before:
            raise SurgeryError(
                f"the cut changes the output from {before} to {after}; cut nothing that reaches the output"
            )
    except Exception as error:
        for place, name, value in reversed(undo):
            _set(place, name, value)
        if isinstance(error, SurgeryError):
            raise
        raise SurgeryError(f"the cut model does not run: {_where(error)}; nothing was cut") from error
    return model


def tensor_of(model: nn.Module, path: str) -> tuple[dict[str, Any], str] | None:
    """Where a parameter or buffer is kept, (dictionary, name); None when there is none of this path."""
    owner, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    for place in (module._parameters, module._buffers):
        if isinstance(place.get(name), Tensor):
            return place, name
    return None


def _stored(module: Any, name: str) -> list[tuple[dict[str, Any], str]]:
    """Where the numbers of a layer's tensor are kept; with a mask in front of it, those and the mask."""
    if parametrize.is_parametrized(module, name):
        chain = module.parametrizations[name]
        return [(chain._parameters, "original"), *[(mask._buffers, "mask") for mask in chain]]
    found = tensor_of(module, name)
    return [] if found is None else [found]


def _edits(
    model: nn.Module, path: str, roles: Mapping[str, Sequence[int]], made: dict[int, nn.Parameter]
) -> list[tuple[Any, str, Any]]:
    """What changes in one layer: (dictionary or module, name, new value), with nothing changed yet.

    Args:
        made: identity of a parameter -> what was already cut out of it, so that what is shared stays shared.
    """
    tensors: dict[tuple[int, str], Tensor] = {}
    places: dict[tuple[int, str], dict[str, Any]] = {}

    def take(stored: list[tuple[dict[str, Any], str]], dim: int, index: Tensor) -> None:
        for place, name in stored:
            key = (id(place), name)
            places[key] = place
            tensor = tensors.get(key, place[name])
            tensors[key] = tensor.detach().index_select(dim, index.to(tensor.device))

    attributes: list[tuple[Any, str, Any]] = []
    if all(role.startswith("dim") for role in roles):
        found = tensor_of(model, path)
        if found is None:
            raise SurgeryError(f"there is no parameter '{path}' to cut; was the plan made for another model?")
        for role, indices in roles.items():
            dim = int(role[3:])
            tensor = found[0][found[1]]
            if dim >= tensor.dim():
                raise SurgeryError(f"parameter '{path}' has no dimension {dim} to cut; it has {tensor.dim()}")
            take([found], dim, _checked(path, "parameter", role, Axis(tensor.shape[dim]), indices))
    else:
        attributes = _layer_edits(model, path, roles, take)
    edits: list[tuple[Any, str, Any]] = []
    for (_, name), tensor in tensors.items():
        place = places[_, name]
        old = place[name]
        if isinstance(old, nn.Parameter):
            new = made.get(id(old))
            if new is None or new.shape != tensor.shape:
                new = made[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad)
            edits.append((place, name, new))
        else:
            edits.append((place, name, tensor))
    return edits + attributes


def _layer_edits(
    model: nn.Module, path: str, roles: Mapping[str, Sequence[int]], take: Any
) -> list[tuple[Any, str, Any]]:
    """Takes what stays of a layer's tensors; gives the attributes that change, (module, name, new value)."""
    here = getattr(model, "meta", {}).get("renamed", {}).get(path, path)  # a graph names layers inside of layers anew
    try:
        module: Any = model.get_submodule(here)
    except AttributeError:
        raise SurgeryError(f"there is no layer '{path}' to cut; was the plan made for another model?") from None
    known = axes(module)
    operator = type(module).__name__
    attributes: dict[str, Any] = {}
    for role, indices in roles.items():
        if role not in known:
            allowed = ", ".join(known) or "nothing"
            raise SurgeryError(f"layer '{path}' ({operator}) cannot lose '{role}'; what it can lose: {allowed}")
        axis = known[role]
        index = _checked(path, operator, role, axis, indices)
        if role == "pad":
            attributes["before"] = int((index < module.before).sum())
            attributes["after"] = len(index) - attributes["before"]
        for name, dim in axis.tensors.items():
            take(_stored(module, name), dim, axis.places(index) if name == "weight" or not axis.shared else index)
        for name, units in axis.attributes.items():
            value = len(index) * units
            attributes[name] = (value,) if isinstance(getattr(module, name), tuple) else value
    return [(module, name, value) for name, value in attributes.items()]


def _checked(path: str, operator: str, role: str, axis: Axis, indices: Sequence[int]) -> Tensor:
    index = torch.as_tensor(list(indices), dtype=torch.long)
    what = f"layer '{path}' ({operator}), role '{role}'"
    if role != "pad" and len(index) == 0:
        raise SurgeryError(f"{what}: no channel would be left; keep at least one")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= axis.size or bool((index[1:] <= index[:-1]).any())):
        raise SurgeryError(f"{what}: kept indices must be ascending within 0..{axis.size - 1}; got {_short(indices)}")
    if axis.groups > 1:
        run = axis.size // axis.groups
        rows = [index[index // run == group] % run for group in range(axis.groups)]
        if any(not torch.equal(row, rows[0]) for row in rows):
            raise SurgeryError(f"{what}: its {axis.groups} groups must keep the same places; got {_short(indices)}")
    return index


def _short(indices: Sequence[int]) -> str:
    return f"{list(indices)}" if len(indices) <= 8 else f"{list(indices[:8])} and {len(indices) - 8} more"


def _get(place: Any, name: str) -> Any:
    return place[name] if isinstance(place, dict) else getattr(place, name)


def _set(place: Any, name: str, value: Any) -> None:
    if isinstance(place, dict):
        place[name] = value
    else:
        setattr(place, name, value)


class _Failed(Exception):
    """The layer whose forward failed, and why."""


def _shape(model: nn.Module, example: Tensor) -> Any:
    """Shapes of the outputs in evaluation mode; a failure names the layer it came from."""
    inside: list[tuple[str, nn.Module]] = []
    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, _, path=path: inside.append((path, m))))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            outputs = model(example)
    except Exception as error:  # whatever the user's forward raises
        path, module = inside[-1] if inside else ("", model)
        text = str(error).strip().splitlines()
        raise _Failed(f"layer '{path}' ({type(module).__name__}) says {text[0] if text else error!r}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return torch.utils._pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else None, outputs)


def _where(error: Exception) -> str:
    return str(error) or type(error).__name__
