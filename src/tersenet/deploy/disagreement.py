"""Why the latency of a model and the sum of the rows of its profile differ, where they do.

The latency is measured without the profiler, the rows under it, in turns. The two never agree to the last percent;
where they are far apart after they were measured twice, one sentence says what the figures themselves show.
"""

from __future__ import annotations

import numpy as np

from tersenet.deploy.timings import Measurement
from tersenet.report.words import runtime_name

APART = 1.5  # times, from which on the profile is measured again, and what remains is explained


def times_apart(latency: float, rows: float) -> float:
    """How many times as long the longer of two times is; 1 where there are no rows to compare with."""
    return max(latency / rows, rows / latency) if rows > 0 and latency > 0 else 1.0


def why_apart(measured: Measurement, rows: float, operators: int, runtime: str) -> str | None:
    """The sentence; None where the two are less than APART times apart.

    Args:
        measured: of the contenders "plain" and "profiled".
        rows: the sum of the rows, milliseconds.
        operators: how many were timed.
        runtime: which one they ran in.
    """
    latency, profiled = (measured.latency(name)["median"] for name in ("plain", "profiled"))
    if times_apart(latency, rows) <= APART:
        return None
    apart = f"latency and sum of the rows are {times_apart(latency, rows):.1f} times apart, measured twice: "
    fastest = min(float(np.min(turns)) for (name, _), turns in measured.turns.items() if name == "plain")
    if latency < rows:
        if profiled > APART * latency:
            return apart + (
                f"the profiler makes a call take {profiled:.3f} ms, so its own cost is in the times of the {operators} "
                "operators; small ones take less than their rows say"
            )
        return apart + "the calls without the profiler were disturbed less by other work; measure when it has ended"
    if times_apart(fastest, rows) <= APART:
        return apart + (
            f"other work on the machine slowed most calls, for the fastest turn took {fastest:.3f} ms a call; measure "
            "when it has ended"
        )
    if profiled > APART * rows:
        counted = f", and what {runtime_name(runtime)} leaves out by whole microseconds" if runtime != "pytorch" else ""
        return apart + (
            f"under the profiler, too, a call takes {profiled:.3f} ms, so the rest passes outside of operators: "
            f"handing over inputs and outputs, starting each of the {operators} operators{counted}; shares are of the "
            "operators alone"
        )
    return apart + (
        f"under the profiler a call takes {profiled:.3f} ms, so the same model runs faster there; the runtime opened "
        "it in another way, or had other memory: open it again, by another call of the command"
    )
