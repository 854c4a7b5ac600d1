"""What is said of an int8 model that a runtime does not run well, on made-up times and operators."""

from __future__ import annotations

import numpy as np
import pytest

from tersenet.deploy.timings import Measurement
from tersenet.ship import left_note, slower_in_integers


def times(float_ms: float, int8_ms: float, flags: list[str]) -> dict[str, Measurement]:
    noise = np.linspace(0.99, 1.01, 20)
    turns = {("float", "openvino"): float_ms * noise, ("int8", "openvino"): int8_ms * noise}
    return {"openvino": Measurement(turns, machine={"flags": flags})}


@pytest.mark.parametrize(
    ("float_ms", "int8_ms", "flags", "said"),
    [
        (1.0, 0.5, [], []),
        (1.0, 1.01, [], []),  # within the slack
        (1.0, 1.5, ["avx512_vnni"], ["int8 is 1.50x slower than float in openvino on this machine; ship"]),
        (1.0, 1.5, ["avx2"], ["int8 is 1.50x slower than float in openvino on this machine: this processor has no"]),
    ],
)
def test_int8_that_is_slower_than_float_is_named(
    float_ms: float, int8_ms: float, flags: list[str], said: list[str]
) -> None:
    found = slower_in_integers(times(float_ms, int8_ms, flags), "int8", "float")
    assert len(found) == len(said)
    for sentence, start in zip(found, said, strict=True):
        assert sentence.startswith(start)


def test_what_is_left_in_float_is_named_up_to_five() -> None:
    assert left_note("openvino", ["Gelu a"]) == (
        "openvino leaves 1 operator of the int8 file in float: Gelu a; use a ReLU there, or skip the layers beside them"
    )
    assert "leaves 7 operators" in left_note("openvino", [f"Gelu {i}" for i in range(7)])
    assert "Gelu 4 and 2 more" in left_note("openvino", [f"Gelu {i}" for i in range(7)])
