"""Every ordered pair of steps: runs, replays, keeps the shape, exports. One per family here; all of them when slow.

Where a step stands in the table with several settings, the first goes with every step and the others with one step per
family: what differs between them is no matter of other settings of other steps.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import laws
from cases import CASES, FAMILIES, task_for, tiny
from tersenet.errors import TersenetError
from tersenet.step import Chain

FAST = list(itertools.product(FAMILIES, repeat=2))
_FIRST = set({type(case.step): name for name, case in reversed(CASES.items())}.values())


def _meet(first: str, second: str) -> bool:
    return {first, second} <= _FIRST or first in FAMILIES or second in FAMILIES


# What cannot follow on what, and what is said then.
REFUSED = {("quantize_aware_trained", "train"): "no parameter to train"}

REST = [pair for pair in itertools.product(sorted(CASES), repeat=2) if pair not in FAST and _meet(*pair)]


def run_pair(first: str, second: str, folder: Path) -> None:
    chain = Chain(steps=(CASES[first].step, CASES[second].step))
    model = tiny(0)
    task = task_for(model)
    if (first, second) in REFUSED:
        with pytest.raises(TersenetError, match=REFUSED[first, second]):
            chain.run(model, task)
        return
    laws.plan_survives_json(chain, model, task)
    laws.plan_and_numbers_are_the_model(chain, model, task, tiny(7))
    laws.shape_is_kept(chain, model, task)
    laws.file_is_the_model(chain, model, task, folder)


@pytest.mark.minutes
@pytest.mark.parametrize(("first", "second"), FAST)
def test_a_pair_keeps_the_laws(first: str, second: str, tmp_path: Path) -> None:
    run_pair(first, second, tmp_path)
    assert list(tmp_path.iterdir()), "the pair was exported"


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), REST)
def test_the_rest_of_the_pairs_keep_the_laws(first: str, second: str, tmp_path: Path) -> None:
    run_pair(first, second, tmp_path)
    assert list(tmp_path.iterdir()) or (first, second) in REFUSED, "the pair was exported"
