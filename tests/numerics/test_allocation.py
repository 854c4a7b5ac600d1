"""The allocation against all combinations."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersenet.errors import SettingsError
from tersenet.numerics.allocation import allocate

LAYER = st.lists(st.tuples(st.integers(0, 30).map(lambda n: n / 7), st.integers(0, 20)), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(layers=st.lists(LAYER, min_size=1, max_size=5), share=st.floats(0, 1.1))
def test_no_combination_is_better(layers: list[list[tuple[float, int]]], share: float) -> None:
    errors, sizes = ([[option[i] for option in layer] for layer in layers] for i in (0, 1))
    least = sum(min(row) for row in sizes)
    budget = least + int(share * (sum(max(row) for row in sizes) - least))
    picks = allocate(errors, sizes, budget)
    assert sum(row[p] for row, p in zip(sizes, picks, strict=True)) <= budget
    best = min(
        sum(row[p] for row, p in zip(errors, ways, strict=True))
        for ways in itertools.product(*(range(len(row)) for row in errors))
        if sum(row[p] for row, p in zip(sizes, ways, strict=True)) <= budget
    )
    assert sum(row[p] for row, p in zip(errors, picks, strict=True)) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_against_a_table_over_all_budgets(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    errors = torch.rand(12, 4, generator=source, dtype=torch.float64)
    sizes = torch.randint(1, 40, (12, 4), generator=source)
    budget = int(sizes.min(dim=1).values.sum()) + 40
    table = torch.zeros(budget + 1, dtype=torch.float64)  # least error with at most so many bytes
    for row, used in zip(errors, sizes.tolist(), strict=True):
        moved = [
            torch.cat([torch.full((u,), torch.inf), table])[: budget + 1] + e for e, u in zip(row, used, strict=True)
        ]
        table = torch.stack(moved).amin(dim=0)
    picks = allocate(errors.tolist(), sizes.tolist(), budget)
    assert sum(int(sizes[layer, pick]) for layer, pick in enumerate(picks)) <= budget
    assert sum(float(errors[layer, pick]) for layer, pick in enumerate(picks)) == pytest.approx(float(table[-1]))


def test_a_network_s_layers_at_seven_widths() -> None:
    source = torch.Generator().manual_seed(0)
    weights = torch.randint(400, 40000, (60,), generator=source).tolist()
    hurt = torch.rand(60, generator=source).tolist()
    errors = [[h * 4.0**-bits for bits in range(2, 9)] for h in hurt]
    sizes = [[-(-n * bits // 8) for bits in range(2, 9)] for n in weights]
    budget = sum(weights) * 4 // 8
    picks = allocate(errors, sizes, budget)
    spent = sum(row[p] for row, p in zip(sizes, picks, strict=True))
    total = sum(row[p] for row, p in zip(errors, picks, strict=True))
    assert 0.99 * budget < spent <= budget
    assert total < sum(row[2] for row in errors)  # four bits for all
    assert len(set(picks)) > 2


def test_a_budget_for_everything_and_one_for_nothing() -> None:
    errors, sizes = [[3.0, 1.0], [2.0, 2.0]], [[1, 9], [4, 2]]
    assert allocate(errors, sizes, 100)[0] == 1
    assert allocate(errors, sizes, 3) == [0, 1]
    assert allocate([], [], 0) == []
    with pytest.raises(SettingsError, match=r"at least 3 bytes.*got 2"):
        allocate(errors, sizes, 2)
