"""The rule of the four causes on made rows, and what follows from it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tersenet.deploy.causes import CAUSES, explained, limits
from tersenet.deploy.roofline import Roofline

# 100 GFLOP/s in float32, 400 in int8; 10 GB/s from memory, 100 from a cache of 1 MB; 16 lanes.
ROOF = Roofline(1, {"float32": {"a": 50e9, "b": 100e9}, "int8": {"b": 400e9}}, 10e9, 100e9, 1_000_000, 16)


def row(**changed: Any) -> dict[str, Any]:
    """A convolution of 100 M flops (1 ms at the peak) and 100 kB (1 us in the cache)."""
    made: dict[str, Any] = {
        "path": "conv", "kind": "Conv2d", "layer": True, "calls": 1, "macs": 50_000_000, "precision": "float32",
        "weight_bytes": 50_000, "activation_bytes": 50_000, "ms": 1.25, "share": 1.0,
        "channels": {"inputs": 64, "outputs": 64, "groups": 1, "positions": 256},
    }  # fmt: skip
    return {**made, **changed}


def channels(**changed: int) -> dict[str, int]:
    return {"inputs": 64, "outputs": 64, "groups": 1, "positions": 256, **changed}


@pytest.mark.parametrize(
    ("changed", "cause", "why"),
    [
        ({}, "macs", "near the compute peak"),
        ({"ms": 1.99}, "macs", "near"),
        ({"ms": 2.1}, "platform", "a good shape at 48 % of the roof"),
        ({"layer": False, "kind": "Reorder", "macs": 0, "channels": None}, "platform", "the runtime's own"),
        ({"macs": 500_000, "weight_bytes": 4_000_000, "ms": 0.5}, "memory", "near the bandwidth"),
        ({"macs": 500_000, "weight_bytes": 4_000_000, "ms": 1.0}, "memory", "used too seldom"),
        ({"macs": 500_000, "weight_bytes": 4_000_000, "ms": 2.0}, "platform", "a good shape"),
        ({"macs": 5_000, "ms": 0.004}, "platform", "calling an operator"),
        ({"macs": 5_000, "ms": 0.03, "calls": 9}, "platform", "calling an operator"),
        ({"macs": 0, "activation_bytes": 400_000, "ms": 0.015, "channels": None}, "memory", "not merged"),
        ({"macs": 0, "activation_bytes": 400_000, "ms": 0.1, "channels": None}, "platform", "not merged"),
        ({"channels": channels(outputs=11), "ms": 4.0}, "parallelism", "11 channels fill 69 %"),
        ({"channels": channels(outputs=11)}, "macs", "near"),
        ({"channels": channels(outputs=1, inputs=1, groups=64), "ms": 4.0}, "parallelism", "depthwise"),
        ({"channels": channels(outputs=16, positions=4), "ms": 4.0}, "parallelism", "only 4 vector results"),
        ({"channels": None, "ms": 4.0}, "platform", "25 % of the roof"),
    ],
)  # fmt: skip
def test_each_cause(changed: dict[str, Any], cause: str, why: str) -> None:
    found = limits(row(**changed), ROOF, 1, changed.get("weight_bytes", 50_000))
    assert found["cause"] == cause, found
    assert why in found["why"]


def test_the_least_times() -> None:
    found = limits(row(), ROOF, 1, 50_000)
    assert found["compute_ms"] == pytest.approx(1.0)  # 100 M operations at 100 G
    assert found["memory_ms"] == pytest.approx(0.001)  # 100 kB at 100 GB/s
    assert found["attainable_gflops"] == pytest.approx(100)
    assert found["reached_gflops"] == pytest.approx(80)
    assert found["of_roof"] == pytest.approx(0.8)
    # Weights of a model that the cache cannot hold come from memory: 50 kB at 10 GB/s.
    assert limits(row(), ROOF, 1, 10**9)["memory_ms"] == pytest.approx(0.0005 + 0.005)
    # A batch repeats the work and the activations, not the weights.
    found = limits(row(), ROOF, 4, 50_000)
    assert found["compute_ms"] == pytest.approx(4.0)
    assert found["memory_ms"] == pytest.approx(0.0005 + 0.002)
    assert limits(row(precision="int8"), ROOF, 1, 50_000)["compute_ms"] == pytest.approx(0.25)


def test_no_rate_above_the_roof_and_no_limit_without_time() -> None:
    assert limits(row(ms=0.5), ROOF, 1, 0)["of_roof"] == 1
    assert set(limits(row(ms=None), ROOF, 1, 0).values()) == {None}
    assert set(limits(row(ms=0.0), ROOF, 1, 0).values()) == {None}


def profile(rows: list[dict[str, Any]]) -> dict[str, Any]:
    total = sum(each["ms"] for each in rows)
    return {"batch": 1, "rows": [{**each, "share": each["ms"] / total} for each in rows]}


def test_every_share_has_one_cause_and_advice_goes_by_share() -> None:
    rows = [row(), row(path="thin", channels=channels(outputs=11), ms=4.0)]
    rows.append(row(path="", kind="Reorder", layer=False, macs=0, ms=0.1, channels=None))
    given = profile(rows)
    before = json.dumps(given)
    found = explained(given, ROOF)
    assert json.dumps(given) == before
    assert set(found["causes"]) == set(CAUSES)
    assert sum(found["causes"].values()) == pytest.approx(1)
    assert [line.split(":")[0] for line in found["advice"]] == [  # 2 % of the platform is not worth a word
        "75 % of the time (1 row) is limited by parallelism",
        "23 % of the time (1 row) is limited by MACs",
    ]
    assert "multiples of 16" in found["advice"][0]
    assert "4.0x that of float32" in found["advice"][1]
    assert json.loads(json.dumps(found)) == found


def test_no_advice_of_what_is_done_already() -> None:
    found = explained(profile([row(precision="int8", ms=0.3)]), ROOF)
    assert "limited by MACs" in found["advice"][0]
    assert "int8" not in found["advice"][0]
    slow = Roofline(1, {"float32": {"a": 100e9}, "int8": {}}, 10e9, 100e9, 1_000_000, 16)
    assert "int8" not in explained(profile([row()]), slow)["advice"][0]
