"""Puts the tensors of a checkpoint under the names of a model: which set in the file, and which prefix comes off.

Nothing is guessed from names of wrappers: every set of tensors in the file is tried with every prefix that makes names
of the model, and what fits is taken. Where several fit, averaged weights go first, as in timm and in the scripts of
most papers that average them; that there were others is said.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersenet.errors import InputWarning, ModelError
from tersenet.models.checkpoints import WeightSet

# Averaged over the training: {"ema": ...}, {"state_dict_ema": ...}, {"params_ema": ...}, {"model_ema": ...}.
_AVERAGED = re.compile(r"(^|[._])(ema|averaged|swa)([._]|$)|ema_model|model_ema", re.IGNORECASE)
# What tools leave in a state dict, and no model reads: AveragedModel's count, thop's counts, torch's extra state.
_LEFT_BEHIND = re.compile(r"(^|\.)(n_averaged|total_ops|total_params|_extra_state|_metadata)$")
# Counts of batches are not part of older files, and only matter to norms without a momentum.
_OPTIONAL = "num_batches_tracked"


@dataclass(frozen=True)
class _Candidate:
    """One set of tensors without one prefix.

    Args:
        name: what a user calls it.
        state: by the names that are left without the prefix.
        missing: names of the model that it lacks.
        program: whether it may hold more than a state dict does.
        beside: names in the same set of the file that do not have the prefix.
        others: entries that are no tensors, by their types.
    """

    name: str
    state: Mapping[str, Tensor]
    missing: Sequence[str]
    program: bool
    beside: Sequence[str]
    others: Mapping[str, str]


def fitting(sets: Sequence[WeightSet], own: Mapping[str, Any], path: Path, part: str = "") -> dict[str, Tensor]:
    """The tensors for a model by its names; counters and aliases may lack.

    Args:
        sets: what the file holds.
        own: the model's state dict.
        path: the file, for messages.
        part: the name of the set to take; empty takes the one that fits.
    Raises:
        ModelError: when no set has the model's names, or several do and nothing says which one is meant.
    """
    candidates = [candidate for each in sets for candidate in _without_prefixes(each, own)]
    others = [each for each in candidates if not each.missing]
    if part:
        chosen = [each for each in candidates if _is_called(each.name, part)]
        if not chosen:
            names = ", ".join(dict.fromkeys(each.name or "the file itself" for each in candidates))
            raise ModelError(f"{path} holds no weights called {part!r}; it holds {names}")
        candidates = chosen
    whole = [each for each in candidates if not each.missing]
    whole = [each for each in whole if _has_shapes(each, own)] or whole
    if not whole:
        # The set with the fewest names missing is the one that was meant.
        best = min(candidates, key=lambda each: len(each.missing))
        raise ModelError(_refusal(best, own, path))
    best = _preferred(whole, path) if len(whole) > 1 else whole[0]
    unexpected = _unexpected(best, own, others)
    if unexpected and not best.program:
        raise ModelError(_refusal(best, own, path))
    _say_what_is_left(best, others, candidates, path)
    return {key: value for key, value in best.state.items() if key in own}


def _has_shapes(each: _Candidate, own: Mapping[str, Any]) -> bool:
    return all(value.shape == own[key].shape for key, value in each.state.items() if key in own)


def _unexpected(best: _Candidate, own: Mapping[str, Any], whole: Sequence[_Candidate]) -> list[str]:
    """Names that are not the model's, nor those of another whole set, nor what tools leave behind."""
    ends = tuple(f".{key}" for each in whole if each is not best for key in each.state if key in own)
    return [
        key
        for key in best.state
        if key not in own and not _LEFT_BEHIND.search(key) and not (ends and key.endswith(ends))
    ]


def _say_what_is_left(
    best: _Candidate, whole: Sequence[_Candidate], candidates: Sequence[_Candidate], path: Path
) -> None:
    """Warns of tensors beside the set that was taken, and of averaged weights that are no whole set."""
    ends = tuple(f".{key}" for each in whole if each is not best for key in each.state)
    left = [key for key in best.beside if not _LEFT_BEHIND.search(key) and not (ends and key.endswith(ends))]
    if left:
        warnings.warn(
            f"{len(left)} tensors in {path} stand beside the weights and were left out ({_first(left)})",
            InputWarning,
            stacklevel=4,
        )
    for each in candidates:
        if each.missing and _AVERAGED.search(each.name) and 2 * len(each.missing) < len(each.state):
            warnings.warn(
                f"{path} holds averaged weights ({each.name}) too, which lack {_first(each.missing)} and were not "
                "taken",
                InputWarning,
                stacklevel=4,
            )


def _without_prefixes(each: WeightSet, own: Mapping[str, Any]) -> list[_Candidate]:
    """A set of tensors under each prefix whose removal, or addition, gives names of the model; the best first."""
    found: dict[str, dict[str, Tensor]] = {}
    for prefix in _prefixes(each.tensors, own):
        if prefix.startswith("+"):
            found[prefix] = {prefix[1:] + key: value for key, value in each.tensors.items()}
        else:
            # What stands under another name is not part of this set: the loss, or another network.
            found[prefix] = {
                key.removeprefix(prefix): value for key, value in each.tensors.items() if key.startswith(prefix)
            }
    candidates = []
    for prefix, state in found.items():
        inner = "" if prefix.startswith("+") else prefix.rstrip(".")
        name = ".".join(part for part in (each.place, inner) if part)
        beside = [] if prefix.startswith("+") else [key for key in each.tensors if not key.startswith(prefix)]
        others = {key.removeprefix(prefix): type(value).__name__ for key, value in each.others.items()}
        candidates.append(_Candidate(name, state, _missing(state, own), each.program, beside, others))
    return candidates


def _prefixes(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    """Prefixes of names in a file ("model." ) that stand before names of the model; "+model." is one of the model's
    own that the file lacks."""
    samples = sorted((key for key in own if not key.endswith(_OPTIONAL)), key=len, reverse=True)[:8]
    found = [""]
    for sample in samples:
        found += [key[: -len(sample)] for key in tensors if key.endswith("." + sample)]
        found += ["+" + sample[: -len(key)] for key in tensors if sample.endswith("." + key)]
    common = [f"+{prefix}" for prefix in {key.split(".")[0] + "." for key in own}]
    return [each for each in dict.fromkeys(found) if not each.startswith("+") or (each in common and len(common) == 1)]


def _missing(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    same = aliases(own)
    groups: dict[str, list[str]] = {}
    for key in own:
        groups.setdefault(same.get(key, key), []).append(key)
    present = {kept for kept, group in groups.items() if any(key in state for key in group)}
    return [
        key
        for key in own
        if key not in state and same.get(key, key) not in present and not key.endswith((_OPTIONAL, "_extra_state"))
    ]


def _is_called(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".") or name.endswith("." + part) or f".{part}." in name


def _preferred(whole: Sequence[_Candidate], path: Path) -> _Candidate:
    """The one of several sets that fit which is averaged, or the first where no name says that they differ in kind."""
    first = whole[0]
    if all(
        each.state.keys() == first.state.keys()
        and all(torch.equal(value, first.state[key]) for key, value in each.state.items())
        for each in whole[1:]
    ):
        return first
    averaged = [each for each in whole if _AVERAGED.search(each.name)]
    names = [each.name or "the file itself" for each in whole]
    if len(averaged) != 1:
        examples = " or ".join(f"{path}#{each.name}" for each in whole if each.name)
        raise ModelError(
            f"{path} holds several sets of weights for this model ({', '.join(names)}); say which: {examples}"
        )
    others = [name for each, name in zip(whole, names, strict=True) if each is not averaged[0]]
    warnings.warn(
        f"{path} holds several sets of weights: the averaged ones ({averaged[0].name}) were taken, not "
        f"{', '.join(others)}; choose by name, such as --weights {path.name}#{others[0]}",
        InputWarning,
        stacklevel=4,
    )
    return averaged[0]


def _refusal(best: _Candidate, own: Mapping[str, Any], path: Path) -> str:
    """What is missing and unexpected, and the nearest names."""
    unexpected = [key for key in best.state if key not in own and not _LEFT_BEHIND.search(key)]
    parts = [f"missing {_first(best.missing)}"] if best.missing else []
    parts += [f"unexpected {_first(unexpected)}"] if unexpected else []
    hint = ""
    if best.missing and unexpected:
        shape = own[best.missing[0]].shape
        like = [key for key in unexpected if best.state[key].shape == shape]
        near = difflib.get_close_matches(best.missing[0], like, 1, cutoff=0.5)
        hint = f" ({near[0]} has the shape of {best.missing[0]})" if near else ""
    where = f"{path}#{best.name}" if best.name else str(path)
    odd = next((key for key in best.missing if key in best.others), None)
    if odd is not None:
        return (
            f"{where} is no state dict: its entry {odd!r} is of type {best.others[odd]}, and every entry must be a "
            "tensor; save model.state_dict() alone, or under the key 'state_dict'"
        )
    return (
        f"the weights in {where} are not this model's: {'; '.join(parts)}{hint}; give the weights of this architecture"
    )


def _first(keys: Iterable[str], count: int = 3) -> str:
    keys = list(keys)
    rest = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + rest


def aliases(state: Mapping[str, Any]) -> dict[str, str]:
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
