"""Patterns against brute force: loops over indices that know nothing of padding or reshaping."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersenet.errors import SettingsError
from tersenet.numerics.patterns import can_lose, expand, parse, protected, unit_sums

SHAPES = [(32, 6, 3, 3), (20, 5, 3, 2), (7, 3, 1, 1), (18, 9), (5, 4, 3), (3, 2, 2, 3, 2)]
NAMES = ["weight", "row", "column", "kernel", "filter", "16x1", "4x2", "8x8"]


def unit_of(name: str, index: tuple[int, ...]) -> tuple[int, ...]:
    """The unit that a weight belongs to, from the description of the pattern alone."""
    o, i, *inside = index
    if name == "weight":
        return index
    if name == "row":
        return (o, i, *inside[:-1])
    if name == "column":
        return (o, i, *inside[:-2], *inside[-1:]) if len(inside) > 1 else index
    if name == "kernel":
        return (o, i)
    if name == "filter":
        return (o,)
    a, b = map(int, name.split("x"))
    return (o // a, i // b, *inside)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_units_are_what_the_pattern_says(name: str, shape: tuple[int, ...]) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums: dict[tuple[int, ...], float] = {}
    for index in itertools.product(*map(range, shape)):
        key = unit_of(name, index)
        sums[key] = sums.get(key, 0.0) + float(values[index])
    pattern = parse(name)
    found = unit_sums(values, pattern)
    assert found.numel() == len(sums)
    assert torch.allclose(found.flatten().sort().values, torch.tensor(sorted(sums.values()), dtype=torch.float64))
    back = expand(found, shape, pattern)
    assert all(
        float(back[index]) == pytest.approx(sums[unit_of(name, index)])
        for index in itertools.product(*map(range, shape))
    )
    assert can_lose(shape, pattern) == (len(sums) > 1)


@pytest.mark.parametrize("shape", [(4, 8), (3, 10, 3, 3), (2, 3, 2, 2)])
@pytest.mark.parametrize("name", ["2:4", "1:4", "3:5"])
def test_n_of_m_protects_the_best_along_the_input_channels(name: str, shape: tuple[int, ...]) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    stay, width = map(int, name.split(":"))
    kept = protected(scores, parse(name))
    for o, *rest in itertools.product(range(shape[0]), *map(range, shape[2:])):
        for start in range(0, shape[1], width):
            where = (o, slice(start, start + width), *rest)
            best = sorted(scores[where].tolist(), reverse=True)[:stay]
            assert sorted(scores[where][kept[where]].tolist(), reverse=True) == best


def test_of_equal_scores_the_first_stay() -> None:
    assert protected(torch.zeros(1, 6), parse("2:4")).tolist() == [[True, True, False, False, True, True]]


def test_nothing_is_protected_elsewhere() -> None:
    assert not bool(protected(torch.rand(3, 4), parse("16x1")).any())


@pytest.mark.parametrize(
    ("name", "shape", "can"),
    [("2:4", (8, 1, 3, 3), False), ("2:4", (8, 2), False), ("2:4", (8, 3), True), ("16x1", (16, 1, 1, 1), False),
     ("weight", (1, 1), False), ("filter", (1, 9, 3, 3), False), ("filter", (2, 9, 3, 3), True)],
)  # fmt: skip
def test_layers_with_nothing_to_lose_are_known(name: str, shape: tuple[int, ...], can: bool) -> None:
    assert can_lose(shape, parse(name)) is can


@pytest.mark.parametrize("name", ["", "weights", "0x1", "4:4", "4:2", "0:4", "16x", "-1x2", "2 : 4", "16X1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="pattern is"):
        parse(name)


def test_the_highest_sparsity() -> None:
    assert parse("2:4").highest == 0.5
    assert parse("1:4").highest == 0.75
    assert parse("kernel").highest == 1.0


def test_booleans_expand_too() -> None:
    units: Tensor = torch.tensor([[True, False]])
    assert expand(units, (3, 2), parse("16x1")).tolist() == [[True, False]] * 3
