"""Plans of cut channels that a person can read and edit: one list of kept channels per layer, the rest follows.

    {"keep": {"layer1.0.conv1": [0, 2, 5]},                  edit this; layers can be added and taken out
     "kept": {"layer1.0.conv1": {"out": [0, 2, 5]},          what follows from it, for every layer that changes
              "layer1.0.bn1": {"channel": [0, 2, 5]}, "layer1.0.conv2": {"in": [0, 2, 5]}},
     "input": "2x3x32x32", "check": "ab4cf411-91b0d1d4"}     shape of an input; checksums of `keep` and `kept`

Of several inputs "input" is the list of their shapes.

"traced" is in it where the model's own forward cannot stay, because sizes are written in it: graph/recut.py.

A plan that nobody edited is applied as it stands. After an edit of `keep` the model is traced with an input of that
shape, and the rest is found anew. `{"keep": ..., "input": ...}` alone is a plan, too. An edit that cannot be is
refused, naming the layers; so is an edit of `kept` that coupled layers disagree about.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.errors import SurgeryError
from tersenet.graph.coupling import Coupling, coupling
from tersenet.graph.trace import Example
from tersenet.numerics.samples import side_by_side
from tersenet.pruning.budget import maker_of, name_of


def plan_of(model: nn.Module, known: Coupling, removed: np.ndarray, example: Example) -> dict[str, Any]:
    """The plan that removes these classes; {} when there are none."""
    if not len(removed):
        return {}
    found = known.plan(model, removed)
    kept = found["kept"]
    cut = [bundle for bundle in known.bundles if np.isin(bundle.classes, removed).any()]
    keep = {_place(known, path, role): kept[path][role] for path, role in map(maker_of, cut)}
    shapes = ["x".join(map(str, each.shape)) for each in side_by_side(example)]
    types = [str(each.dtype).removeprefix("torch.") for each in side_by_side(example)]
    several = isinstance(example, tuple)
    kind = {} if set(types) == {"float32"} else {"input_type": types if several else types[0]}
    return {
        "keep": keep,
        **found,
        "input": shapes if several else shapes[0],
        **kind,
        "check": f"{_checksum(keep)}-{_checksum(kept)}",
    }


def cut_of(model: nn.Module, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan, edited or not, does to a model, for graph/recut.py.

    Raises:
        SurgeryError: for an edit that cannot be, or another model's plan.
    """
    keep, kept = plan.get("keep"), plan.get("kept")
    if keep is None and kept is None:
        raise SurgeryError(f"the plan has the entries {sorted(plan)}, of which none is 'keep' or 'kept'; give one")
    kept_as_written, keep_as_written = _as_written(plan)
    unedited = kept_as_written and (keep is None or keep_as_written)
    if kept is not None and (unedited or (keep is None and "input" not in plan)):
        return {key: plan[key] for key in ("kept", "traced") if key in plan}
    known = coupling(model, _example(model, plan))
    if keep is None:
        assert kept is not None
        every = {(path, role): kept[path][role] for path in kept for role in kept[path]}
        return known.plan(model, removed_by(model, known, every))
    found = known.plan(model, removed_by(model, known, keep))
    derived = found["kept"]
    if kept is not None and not kept_as_written and _checksum(kept) != _checksum(derived):
        path = next(path for path in {**kept, **derived} if kept.get(path) != derived.get(path))
        raise SurgeryError(
            f"the plan was edited in 'kept', which disagrees with 'keep' about layer '{path}'; edit 'keep' only, and "
            "take 'kept' out"
        )
    return found


def removed_by(model: nn.Module, known: Coupling, keep: Mapping[Any, Sequence[int]]) -> np.ndarray:
    """The classes that go when layers keep these channels only.

    Args:
        keep: path of a layer that makes channels, or (path, role) of any slot -> the kept positions.
    Raises:
        SurgeryError: for an unknown layer, a channel out of range or that cannot be cut, an empty list, and coupled
            channels of which one stays and another goes.
    """
    said: dict[int, tuple[str, int, bool]] = {}  # class -> layer, position, whether it stays
    for place, kept in keep.items():
        path, role = place if isinstance(place, tuple) else _slot(known, place)
        classes = _classes(model, known, path, role)
        stays = np.isin(np.arange(len(classes)), _positions(path, kept, len(classes)))
        held = np.flatnonzero(~stays & (classes == 0))
        if len(held):
            reason = known.frozen.get(path, "it is coupled to channels that must stay")
            raise SurgeryError(f"channel {held[0]} of layer '{path}' cannot be cut: {reason}; keep it")
        for position, own in enumerate(classes.tolist()):
            if own == 0:
                continue
            other, there, stayed = said.setdefault(own, (path, position, bool(stays[position])))
            if stayed != stays[position]:
                raise SurgeryError(
                    f"channel {there} of layer '{other}' {'stays' if stayed else 'goes'} and channel {position} of "
                    f"layer '{path}' {'goes' if stayed else 'stays'}, but they are coupled; keep both or none"
                )
    return np.array(sorted(own for own, (_, _, stays) in said.items() if not stays), dtype=np.int64)


def _place(known: Coupling, path: str, role: str) -> str:
    """How a plan names the channels of a slot: by the path, with the dimension of a parameter that has several."""
    return path if _roles(known, path) == [role] else f"{path}:{role}"


def _slot(known: Coupling, place: str) -> tuple[str, str]:
    """The slot that a plan names."""
    path, _, role = place.rpartition(":")
    if role and (path, role) in known.slots:
        return path, role
    return place, next(iter(_roles(known, place)), "out")


def _roles(known: Coupling, path: str) -> list[str]:
    """The roles in which a layer makes or carries channels."""
    return [role for at, role in known.slots if at == path and role != "in"]


def _classes(model: nn.Module, known: Coupling, path: str, role: str) -> np.ndarray:
    if (path, role) in known.slots:
        return known.slots[path, role]
    names = list(dict.fromkeys(name_of(bundle) for bundle in known.bundles))
    possible = ", ".join(names[:40]) + (" and more" if len(names) > 40 else "")
    try:
        kind = type(model.get_submodule(path)).__name__
    except AttributeError:
        raise SurgeryError(
            f"there is no layer '{path}' to cut; was the plan made for another model? Possible: {possible}"
        ) from None
    raise SurgeryError(f"layer '{path}' ({kind}) makes no channels that can be cut; possible: {possible}")


def _positions(path: str, kept: Sequence[int], size: int) -> np.ndarray:
    wrong = [place for place in kept if type(place) is not int or not 0 <= place < size]
    if wrong:
        raise SurgeryError(f"layer '{path}' has channels 0 to {size - 1}, and the plan keeps {wrong[0]!r}; take it out")
    if not len(kept):
        raise SurgeryError(f"the plan keeps no channel of layer '{path}'; keep at least one of its {size}")
    if any(b <= a for a, b in itertools.pairwise(kept)):
        raise SurgeryError(
            f"the channels that the plan keeps of layer '{path}' must ascend without repetition; sort them"
        )
    return np.asarray(kept, dtype=np.int64)


def _as_written(plan: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether `kept`, and whether `keep`, is as `plan_of` wrote it."""
    keep, _, kept = str(plan.get("check")).partition("-")
    return kept == _checksum(plan.get("kept")), keep == _checksum(plan.get("keep"))


def _example(model: nn.Module, plan: Mapping[str, Any]) -> Example:
    said, types = plan.get("input"), plan.get("input_type", "float32")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def zeros(said: Any, kind: str) -> Tensor:
        return torch.zeros([int(size) for size in str(said).split("x")], dtype=getattr(torch, kind), device=device)

    try:
        if isinstance(said, list):
            return tuple(map(zeros, said, types if isinstance(types, list) else [types] * len(said)))
        return zeros(said, types)
    except (ValueError, RuntimeError, AttributeError, TypeError):
        raise SurgeryError(
            f"the plan was edited and its 'input' is {said!r}; give the shape of an input, such as '2x3x32x32'"
        ) from None


def _checksum(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
