"""Which of four causes limits each layer, and what to try against it.

With a roofline (`roofline`), a layer has a least time for its operations (`compute_ms`) and one for its bytes
(`memory_ms`); no runtime beats the longer of the two (`best_ms`), and `of_roof` = best_ms / ms says how near it came.
Bytes are taken at the bandwidth of where they lie: weights in the cache when those of the whole model fit in half of
it, activations when those of the layer do. The cause is the first of these that holds:

1. **platform**: the time belongs to no layer. The runtime changed a layout, rounded, or made an operator of its own.
2. **macs** or **memory**: of_roof is at least `NEAR` (0.5); the longer of the two least times. Good kernels reach half
   of the roof on layers of middling size, while the roof is that of the size that suits best.
3. **platform**: ms - best_ms is at most `CALL_MS` (0.004) for each of its calls. So much it costs to call an
   operator at all (1 to 4 microseconds were seen for operators of a few numbers); what it does hardly matters.
4. **memory**: no multiply-adds, and bytes that take at least `STREAM` (0.25) of the time. It is a pass over the data
   that the runtime did not merge with a layer. Else **platform**: an operator whose bytes do not explain its time.
5. **parallelism**: the work cannot fill the machine. It is a depthwise convolution (one input channel per output, so
   that nothing loaded is used twice); or less than `FULL` (0.8) of the vector lanes have an output channel (11 channels
   in registers of 16 leave a third idle); or there are fewer vector results than `IN_FLIGHT` (8) per thread (a fused
   multiply-add takes about 4 cycles and a core starts 2 per cycle, so fewer wait for each other).
6. **memory**: memory_ms is the longer one and at least `STREAM` of the time. A layer that streams its weights through
   once, as a linear one does at batch 1, comes less near to a copy's bandwidth than a convolution to its peak.
7. **platform**: all else. The shape is good and the roof is far: the runtime has no fast kernel for this operator, did
   not run it in integers, or shares the core with something else.

The rule is a heuristic: it names the most likely cause from outside, without the processor's own counters.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tersenet.deploy.roofline import Roofline

CAUSES = ("macs", "memory", "parallelism", "platform")
NEAR = 0.5
CALL_MS = 0.004
STREAM = 0.25
FULL = 0.8
IN_FLIGHT = 8
_WORTH_SAYING = 0.05  # of the time
_CAUSE_NAMES = {"macs": "MACs", "memory": "memory traffic", "parallelism": "parallelism", "platform": "the platform"}


def explained(found: dict[str, Any], roof: Roofline) -> dict[str, Any]:
    """A profile with the limits of each row, the time per cause, and advice; the profile itself is left as it was.

    Rows get `compute_ms`, `memory_ms`, `attainable_gflops` and `reached_gflops` (10^9 operations per second, 2 x
    multiply-adds), `of_roof` (0-1), `cause` (of `CAUSES`) and `why`; all None where a row took no time of its own. The
    profile gets `causes` (cause -> share of the time), `advice` (sentences) and `roofline` (the figures).

    Args:
        found: of `tersenet.deploy.profile`.
        roof: of the same number of threads.
    """
    weights = sum(row["weight_bytes"] for row in found["rows"])
    rows = [{**row, **limits(row, roof, found["batch"], weights)} for row in found["rows"]]
    shares: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    for row in rows:
        if row["cause"] is not None:
            shares[row["cause"]] += row["share"]
    return {**found, "rows": rows, "causes": shares, "advice": advice(rows, shares, roof), "roofline": figures(roof)}


def figures(roof: Roofline) -> dict[str, Any]:
    """A roofline as JSON in the units that people read: 10^9 operations (2 x multiply-adds) and bytes per second."""
    return {
        "threads": roof.threads,
        "peak_gflops": {precision: roof.peak(precision) / 1e9 for precision, by in roof.flops.items() if by},
        "measured_gflops": {
            precision: {engine: value / 1e9 for engine, value in by.items()} for precision, by in roof.flops.items()
        },
        "memory_gb_s": roof.memory / 1e9,
        "cache_gb_s": roof.cache / 1e9,
        "cache_bytes": roof.cache_bytes,
    }


def limits(row: Mapping[str, Any], roof: Roofline, batch: int, weights: int) -> dict[str, Any]:
    """What limits one row.

    Args:
        row: of a profile: `ms`, `calls`, `layer`, `macs`, `weight_bytes`, `activation_bytes`, `precision`, `channels`.
        batch: samples of the call that `ms` is of.
        weights: bytes of all weights of the model.
    """
    names = ("compute_ms", "memory_ms", "attainable_gflops", "reached_gflops", "of_roof", "cause", "why")
    if not row["ms"]:  # none of its own, or less than the profiler can tell
        return dict.fromkeys(names)
    flops, activations = 2 * row["macs"] * batch, row["activation_bytes"] * batch
    compute, reading = roof.least_seconds(flops, row["precision"], row["weight_bytes"], weights)
    memory = reading + roof.least_seconds(0, row["precision"], activations, activations)[1]
    best = max(compute, memory)
    of_roof = min(1e3 * best / row["ms"], 1.0)
    cause, why = _cause(row, roof, batch, 1e3 * compute, 1e3 * memory, of_roof)
    return {
        "compute_ms": 1e3 * compute,
        "memory_ms": 1e3 * memory,
        "attainable_gflops": flops / best / 1e9 if flops else None,
        "reached_gflops": flops / row["ms"] / 1e6 if flops else None,
        "of_roof": of_roof if row["layer"] else None,
        "cause": cause,
        "why": why,
    }


def _cause(
    row: Mapping[str, Any], roof: Roofline, batch: int, compute: float, memory: float, of_roof: float
) -> tuple[str, str]:
    """The rule of the module, in its order; the times are milliseconds."""
    if not row["layer"]:
        return "platform", "an operator of the runtime's own"
    if of_roof >= NEAR:
        return ("macs", "near the compute peak") if compute >= memory else ("memory", "near the bandwidth")
    if row["ms"] - max(compute, memory) <= CALL_MS * row["calls"]:
        return "platform", "the cost of calling an operator"
    if not row["macs"]:
        if memory >= STREAM * row["ms"]:
            return "memory", "a pass over the data that was not merged with a layer"
        return "platform", "an operator that was not merged with a layer"
    if (idle := _idle(row["channels"], roof, batch)) is not None:
        return "parallelism", idle
    if memory >= max(compute, STREAM * row["ms"]):
        return "memory", "bytes that are used too seldom"
    return "platform", f"a good shape at {100 * of_roof:.0f} % of the roof"


def _idle(channels: Mapping[str, int] | None, roof: Roofline, batch: int) -> str | None:
    """Why the shape cannot fill the machine; None where it can, or where nothing is known of it."""
    if channels is None:
        return None
    if channels["groups"] > 1 and channels["inputs"] == 1:
        return "depthwise: nothing that is loaded is used twice"
    vectors = math.ceil(channels["outputs"] / roof.lanes)
    filled = channels["outputs"] / (vectors * roof.lanes)
    if filled < FULL:
        return f"{channels['outputs']} channels fill {100 * filled:.0f} % of the vector lanes"
    results = batch * channels["positions"] * vectors * channels["groups"]
    if results < IN_FLIGHT * roof.threads:
        return f"only {results} vector results for {roof.threads} thread{'s' if roof.threads > 1 else ''}"
    return None


def advice(rows: Sequence[Mapping[str, Any]], shares: Mapping[str, float], roof: Roofline) -> list[str]:
    """One sentence for each cause with at least 5 % of the time, the largest first: what to try against it."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["cause"] is not None:
            found[row["cause"]].append(row)
    said = []
    for cause in sorted(found, key=lambda each: -shares[each]):
        if shares[cause] >= _WORTH_SAYING:
            what = _ADVICE[cause](found[cause], roof)
            count = f"{len(found[cause])} row{'s' if len(found[cause]) > 1 else ''}"
            said.append(
                f"{100 * shares[cause]:.0f} % of the time ({count}) is limited by {_CAUSE_NAMES[cause]}: {what}."
            )
    return said


def _against_macs(rows: Sequence[Mapping[str, Any]], roof: Roofline) -> str:
    tries = ["fewer blocks (drop_blocks) or channels (prune_channels) take multiply-adds away"]
    gain = roof.peak("int8") / roof.peak("float32")
    if any(row["precision"] == "float32" for row in rows) and gain >= 1.2:
        tries.insert(0, f"int8 (quantize), whose peak is {gain:.1f}x that of float32 here")
    return "; ".join(tries)


def _against_memory(rows: Sequence[Mapping[str, Any]], roof: Roofline) -> str:
    tries = []
    if any(row["precision"] == "float32" and row["macs"] for row in rows):
        tries.append("int8 (quantize) moves a quarter of the bytes")
    if any(not row["macs"] for row in rows):
        tries.append("fold norms (fold_batch_norm) and use activations that the runtime merges, such as ReLU")
    if any(row["weight_bytes"] > row["activation_bytes"] for row in rows):
        tries.append("a larger batch uses each weight more often")
    return "; ".join(tries or ["fewer blocks or channels, or a smaller image, move fewer bytes"])


def _against_parallelism(rows: Sequence[Mapping[str, Any]], roof: Roofline) -> str:
    tries = []
    known = [row["channels"] for row in rows if row["channels"] is not None]
    depthwise = [each["groups"] > 1 and each["inputs"] == 1 for each in known]
    if not all(depthwise):
        tries.append(f"widths that are multiples of {roof.lanes} (prune_channels: multiple_of)")
        tries.append("fewer, wider layers, or a larger batch")
    if any(depthwise):
        tries.append("fewer depthwise layers, or dense ones in their place, since they waste most of the arithmetic")
    return "; ".join(tries)


def _against_platform(rows: Sequence[Mapping[str, Any]], roof: Roofline) -> str:
    outside = [row for row in rows if not row["layer"]]
    calls = [row for row in rows if row["layer"] and row["why"] == "the cost of calling an operator"]
    tries = []
    if calls:
        norms = ", fold_batch_norm" if any("Norm" in row["kind"] for row in calls) else ""
        tries.append(f"fewer layers (drop_blocks{norms}), since each costs a call whatever its size")
    if outside:
        kinds = ", ".join(dict.fromkeys(row["kind"] for row in outside))
        tries.append(
            f"the runtime's own operators ({kinds}) stand where layouts or precisions meet: let neighbours agree"
        )
    if len(calls) + len(outside) < len(rows):
        tries.append("compare another runtime (--runtime onnxruntime,openvino)")
    return "; ".join(tries)


_ADVICE = {
    "macs": _against_macs,
    "memory": _against_memory,
    "parallelism": _against_parallelism,
    "platform": _against_platform,
}
