"""Fifty random networks through cut, fold, files and int8: each right, or refused in one sentence, and few refused.

benchmarks/random_networks.py does the same to as many as asked for. hypothesis draws the networks,
the same ones each time; what fails is printed as the parts that it was drawn from.
"""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GROUPS, EACH = 10, 5
SEEN: Counter[str] = Counter()


@pytest.fixture(scope="module")
def tools() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return runpy.run_path(str(BENCHMARKS / "random_networks.py"))
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.minutes
@pytest.mark.parametrize("group", range(GROUPS))
def test_random_networks_are_right(tools: Any, group: int) -> None:
    @seed(group)
    @settings(
        max_examples=EACH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def examined(data: Any) -> None:
        torch.manual_seed(group)
        model, inputs = tools["network"](lambda options: data.draw(st.sampled_from(list(options))))
        rows = tools["examine"]((model, inputs), list(tools["JOBS"]))
        print([(name, str(part)) for name, part in model.parts.items()], model.steps, model.form)
        assert {job: row for job, row in rows.items() if row["verdict"] in ("wrong", "crash")} == {}
        SEEN.update(row["verdict"] for row in rows.values())

    examined()
    assert SEEN["right"] > 0.9 * SEEN.total()


def test_a_wrong_result_is_found(tools: Any, tmp_path: Path) -> None:
    """What each job holds its result to: a network that computes something else does not pass."""
    same, wrong = tools["_same"], tools["Wrong"]
    value = torch.ones(2, 3)
    same([value], [value + 1e-6], "it", 1e-4)
    for other in (value + 1e-2, torch.ones(2, 4), value * float("nan")):
        with pytest.raises(wrong):
            same([other], [value], "it", 1e-4)
