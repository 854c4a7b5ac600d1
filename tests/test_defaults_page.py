"""docs/defaults.md says what its log says, and the log says that the defaults are the better settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import defaults  # noqa: E402

LOG = json.loads((ROOT / "benchmarks" / "results" / "defaults.json").read_text(encoding="utf-8"))
BETTER = [case for case in defaults.CASES if case.instead in ({"refit": False}, {"rounding": "nearest"})]


def test_the_page_says_what_the_log_says() -> None:
    text = (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
    assert defaults.written(text, LOG) == text
    assert text.count("**: ") == len(LOG["networks"]) >= 2


def test_the_log_is_of_these_cases_and_of_the_defaults_as_they_are() -> None:
    for network in LOG["networks"].values():
        assert set(network["cases"]) == {defaults.key_of(case) for case in defaults.CASES}
    for case in defaults.CASES:
        plain = defaults.chain_of(case.step, case.settings).steps[0]
        assert all(getattr(plain, key) != value for key, value in case.instead.items()), case


def test_what_the_defaults_reconstruct_is_nearer_to_the_original() -> None:
    assert len(BETTER) >= 8
    for network in LOG["networks"].values():
        for case in BETTER:
            row = network["cases"][defaults.key_of(case)]
            if "refused" not in row:
                assert row["default"]["divergence"] < row["instead"]["divergence"], (network["title"], case.name)
                assert row["default"]["score"] >= row["instead"]["score"] - 0.002, (network["title"], case.name)
