"""Class names: those of the splits of one data set put together, and those of data and model, always by name.

A class number means nothing without the list that it counts in. Splits, a held-out set and a model may each have such
a list, and no two need agree in what they hold or in their order; so numbers are translated by name wherever both
sides have names, and what cannot be translated is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tersenet.errors import DataError, InputWarning


@dataclass(frozen=True)
class Labels:
    """Labels of some images: `numbers` (N,) int64 count in `names`, or in no list where `names` is empty."""

    numbers: np.ndarray
    names: tuple[str, ...] = ()


def of_words(words: Sequence[str]) -> Labels:
    """Words, numbered in alphabetical order, as torchvision's ImageFolder does."""
    names, numbers = np.unique(np.asarray(words, dtype=object).astype(str), return_inverse=True)
    return Labels(numbers.astype(np.int64).reshape(-1), tuple(map(str, names)))


def listed(names: Sequence[str], most: int = 5) -> str:
    """ "ant, bee, cow and 7 more"."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def united(parts: Mapping[str, Labels], what: str) -> tuple[dict[str, Labels], tuple[str, ...]]:
    """The labels of all splits in one list: that of the training set where it holds every class, else all names.

    Args:
        parts: labels by split, the training set first where there is one.
        what: the data in words, for messages.
    Raises:
        DataError: when one split has names and another has numbers only.
    """
    named = [split for split, part in parts.items() if part.names]
    if not named:
        return dict(parts), ()
    if len(named) < len(parts):
        bare = next(split for split in parts if split not in named)
        raise DataError(
            f"the {named[0]} set of {what} has class names and the {bare} set has numbers, which cannot be told apart "
            "by name; give both the same kind of labels"
        )
    first, *others = named
    names = parts[first].names
    extra = sorted({name for split in others for name in parts[split].names} - set(names))
    if extra:
        # Sorted lists stay sorted; a list with an order of its own keeps it and grows at its end.
        names = tuple(sorted({*names, *extra})) if names == tuple(sorted(names)) else (*names, *extra)
        if "train" in parts:
            warnings.warn(
                f"the training set of {what} has no images of {len(extra)} of the {len(names)} classes "
                f"({listed(extra)}), so nothing can learn them",
                InputWarning,
                stacklevel=3,
            )
    lacking = sorted(set(names) - set(parts["test"].names)) if "test" in parts else []
    if lacking and len(named) > 1:
        warnings.warn(
            f"the test set of {what} has no images of {len(lacking)} of the {len(names)} classes ({listed(lacking)}), "
            "so the score says nothing about them",
            InputWarning,
            stacklevel=3,
        )
    return {split: Labels(_translated(part, names), names) for split, part in parts.items()}, names


def in_model_order(names: tuple[str, ...], model: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The list that class numbers count in: the model's where it has every class of the data, else the data's.

    Args:
        names: of the data; empty where its labels are numbers.
        model: names that the model has for its outputs; empty where it has none.
        what: the data in words, for messages.
    """
    if not names or not model or names == model:
        return names or model
    if is_counted(names) and len(names) <= len(model):
        return model  # "0", "1", ... are the numbers of outputs
    if set(names) <= set(model):
        return model
    shared = [name for name in names if name in model]
    if shared:
        strange = [name for name in names if name not in model]
        place = next(i for i, name in enumerate(names) if i >= len(model) or name != model[i])
        known = f"not {model[place]!r}" if place < len(model) else f"and the model has {len(model)} outputs"
        warnings.warn(
            f"{what} has {len(strange)} classes that the model has no output for by name ({listed(strange)}), so its "
            f"own order of classes is used: output {place} is {names[place]!r}, {known}",
            InputWarning,
            stacklevel=3,
        )
    return names


def translated(part: Labels, names: tuple[str, ...]) -> np.ndarray:
    """Class numbers (N,) in another list; as they are where either side has no names, or only counts."""
    if not part.names or not names or part.names == names:
        return part.numbers
    if is_counted(part.names) and not set(part.names) <= set(names):
        return part.numbers
    return _translated(part, names)


def is_counted(names: tuple[str, ...]) -> bool:
    """Whether the names only say the numbers: "0", "1", "2", ..."""
    return names == tuple(map(str, range(len(names))))


def warn_of_numbers(names: tuple[str, ...], what: str) -> None:
    """Folders named 0 to 10 and more do not stand in the order of their numbers; says so."""
    if len(names) > 2 and all(name.isdecimal() for name in names) and list(names) != sorted(names, key=int):
        warnings.warn(
            f"the classes of {what} are numbers in alphabetical order ({listed(names)}), as torchvision's ImageFolder "
            "has them; name the folders 00, 01, ... where the numbers should count",
            InputWarning,
            stacklevel=3,
        )


def _translated(part: Labels, names: tuple[str, ...]) -> np.ndarray:
    position = {name: number for number, name in enumerate(names)}
    table = np.asarray([position[name] for name in part.names], np.int64)
    return table[part.numbers]
