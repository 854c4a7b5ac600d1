"""What a report comes down to: how much smaller and faster each file is, at what loss, and the verdict in one sentence.

The first row is the original, the last row is what ships. Like is held against like: the file that is deployed (the
.onnx, or the .pt2 where PyTorch is the first runtime) against the original's of the same format, in bytes and in the
latency in the first runtime named; the .terse file against the original's lossless .terse and against its float32
weights. "Not slower" means that the interval of the time left does not lie above 1.02.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tersenet.numerics.scale import Scale
from tersenet.report.words import bytes_text, factor_text, left_text, milliseconds_text, runtime_name

SLACK = 1.02
FLOAT32_BYTES = 4
# What each runtime reads, where that is no .onnx file.
_READS = {"pytorch": "pt2", "pytorch-compiled": "pt2", "torch": "pt2"}


@dataclass(frozen=True)
class Change:
    """A quantity before and after, with the interval of what is left of it where that was measured."""

    before: float
    after: float
    low: float | None = None
    high: float | None = None

    @property
    def left(self) -> float:
        return self.after / self.before

    @property
    def factor(self) -> float:
        return self.before / self.after

    @property
    def grew(self) -> bool:
        """Whether there is surely more of it than before, beyond the slack."""
        return (self.left if self.low is None else self.low) > SLACK

    @property
    def shrank(self) -> bool:
        """Whether there is surely less of it than before."""
        return (self.left if self.high is None else self.high) < 1.0


def first_runtime(report: dict[str, Any]) -> str | None:
    """The runtime of the headline: the first one that a latency was measured in, as the rows name them in order."""
    named = report["settings"].get("runtime") or report["settings"].get("runtimes") or []
    named = [name.strip() for name in named.split(",")] if isinstance(named, str) else list(named)
    measured = [runtime for row in (report["rows"][-1], *report["rows"]) for runtime in row.get("latency_ms", {})]
    return next((name for name in (*named, *measured) if name in measured), None)


def read_by(runtime: str | None) -> str:
    """The format of the file that a runtime of a report reads."""
    return _READS.get(runtime or "", "onnx")


def deployed(report: dict[str, Any]) -> str | None:
    """The format of the file that is deployed: what the first runtime reads, else .onnx, .pt2 or .terse."""
    sizes = report["rows"][-1].get("file_bytes", {})
    return next((kind for kind in (read_by(first_runtime(report)), "onnx", "pt2", "terse") if sizes.get(kind)), None)


def smallest_bytes(row: dict[str, Any]) -> tuple[str, int] | None:
    """The format and size that limits of bytes are held against: .terse, else .onnx, else .pt2."""
    sizes = row.get("file_bytes", {})
    return next(((kind, sizes[kind]) for kind in ("terse", "onnx", "pt2") if sizes.get(kind)), None)


def float_file_bytes(report: dict[str, Any]) -> tuple[str, int] | None:
    """The format and size that shares of bytes are of: the original's .onnx, else its .terse, else its .pt2."""
    sizes = report["rows"][0].get("file_bytes", {})
    return next(((kind, sizes[kind]) for kind in ("onnx", "terse", "pt2") if sizes.get(kind)), None)


def size_change(report: dict[str, Any], row: dict[str, Any], kind: str | None) -> Change | None:
    """Bytes of the original's file against those of a row's file of the same format; None where one is not known."""
    before, after = (each.get("file_bytes", {}).get(kind) for each in (report["rows"][0], row))
    return Change(before, after) if before and after else None


def float32_change(report: dict[str, Any], row: dict[str, Any]) -> Change | None:
    """Bytes of the original's weights as float32 against those of a row's .terse file; None where one is not known."""
    params, after = report["rows"][0].get("params"), row.get("file_bytes", {}).get("terse")
    return Change(FLOAT32_BYTES * params, after) if params and after else None


def latency_change(report: dict[str, Any], row: dict[str, Any], runtime: str | None) -> Change | None:
    """Milliseconds of the original against those of a row in a runtime; None where they cannot be compared.

    Rows with other threads or batch are not comparable. Where the run did not measure the interval of the time left in
    shared turns (`left_interval`), the widest one that both rows' intervals allow is taken, so that a gain is not
    claimed too easily.
    """
    before = report["rows"][0].get("latency_ms", {}).get(runtime)
    after = row.get("latency_ms", {}).get(runtime)
    if not before or not after or not before["median"] or not after["median"]:
        return None
    if any(before.get(key) != after.get(key) for key in ("threads", "batch")):
        return None
    low, high = after["low"] / max(before["high"], 1e-12), after["high"] / max(before["low"], 1e-12)
    if after.get("left_interval"):
        low, high = after["left_interval"]
    return Change(before["median"], after["median"], low, high)


def drop(report: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Points of score lost against the original (or units of a metric that is no share); negative when it gained."""
    before, after = report["rows"][0].get("score"), row.get("score")
    return None if before is None or after is None else Scale.of(report).lost(before, after)


def surely_worse(report: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the whole interval of a row's score is worse than the original's score."""
    before, interval = report["rows"][0].get("score"), row.get("score_interval")
    return before is not None and interval is not None and Scale.of(report).worse(interval, before)


def missed_by(target: dict[str, Any]) -> str | None:
    """How far a target was missed, in its own unit ("0.06x"); None where the two values cannot be subtracted."""
    parts = [
        re.fullmatch(r"\D*?(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*(\D*)", str(target[key])) for key in ("wanted", "got")
    ]
    if parts[0] is None or parts[1] is None or parts[0][2].strip() != parts[1][2].strip():
        return None
    unit = parts[0][2].strip()
    return f"{abs(float(parts[1][1]) - float(parts[0][1])):.3g}{' ' if len(unit) > 1 else ''}{unit}"


def verdict(report: dict[str, Any]) -> str:
    """The outcome in one sentence, bad news included."""
    rows = report["rows"]
    if len(rows) == 1:
        return f"The original as it is: {', '.join(facts(report, rows[0])) or 'nothing was measured'}"
    sentence = gains(report) + score_clause(report) + terse_clause(report) + targets_clause(report)
    return sentence[0].upper() + sentence[1:]


def facts(report: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """A row's sizes, latency and score without a comparison."""
    sizes = row.get("file_bytes", {})
    found = [f"{bytes_text(sizes[kind])} as .{kind}" for kind in ("onnx", "pt2", "terse") if sizes.get(kind)]
    runtime = first_runtime(report)
    if runtime and (latency := row.get("latency_ms", {}).get(runtime)):
        found.append(f"{milliseconds_text(latency['median'])} in {runtime_name(runtime)}")
    if row.get("score") is not None:
        found.append(score_text(report, row))
    return found


def gains(report: dict[str, Any]) -> str:
    """ "the .onnx file is 2.1x smaller (0.48 of the bytes) and 1.9x faster in ONNX Runtime (0.52 of the time)" """
    last, runtime, kind = report["rows"][-1], first_runtime(report), deployed(report)
    size, time = size_change(report, last, kind), latency_change(report, last, runtime)
    phrases: list[tuple[bool, str]] = []
    if size:
        phrases.append((size.shrank, smaller(size)))
    if time:
        word = f"{factor_text(time.factor)} faster" if time.shrank else "NOT faster"
        word = f"{factor_text(time.left)} SLOWER" if time.grew else word
        phrases.append((time.shrank, f"{word} in {runtime_name(runtime or '')} ({left_text(time.left)} of the time)"))
    if not phrases:
        return "neither size nor latency can be compared with the original"
    joint = " and " if len({good for good, _ in phrases}) == 1 else " but "
    text = f"the .{kind} file is {joint.join(words for _, words in phrases)} than the original's"
    return text if time else text + " (latency was not compared)"


def smaller(size: Change) -> str:
    """ "2.1x smaller (0.48 of the bytes)" """
    word = f"{factor_text(size.factor)} smaller" if size.shrank else "not smaller"
    word = f"{factor_text(size.left)} LARGER" if size.grew else word
    return f"{word} ({left_text(size.left)} of the bytes)"


def terse_clause(report: dict[str, Any]) -> str:
    """ "; the .terse file is 6.9x smaller (0.14 of the bytes) than the original's and 8.3x smaller than ..." """
    last = report["rows"][-1]
    own = None if deployed(report) == "terse" else size_change(report, last, "terse")
    raw = float32_change(report, last)
    said = [f"{smaller(own)} than the original's lossless .terse"] if own else []
    said += [f"{smaller(raw)} than its float32 weights"] if raw else []
    return f"; the .terse file is {' and '.join(said)}" if said else ""


def score_clause(report: dict[str, Any]) -> str:
    """ ", at 0.23 points of accuracy lost (91.50 % of 10,000 images, 95 % interval 90.9-92.0, ...)" """
    first, last, scale = report["rows"][0], report["rows"][-1], Scale.of(report)
    lost = drop(report, last)
    if lost is None:
        return ", with no score measured"
    inside = ""
    if scale.same(first["score"], last["score"]):
        clause = f", with no {scale.name} lost"
    elif lost < 0:
        clause = f", with {scale.loss_text(-lost)} of {scale.name} gained"
    else:
        clause = f", at {scale.loss_text(lost)} of {scale.name} lost"
        if last.get("score_interval"):
            beyond = "lies below" if scale.higher_is_better else "lies above"
            where = beyond if surely_worse(report, last) else "holds"
            inside = f", which {where} the original's {scale.text(first['score'])}"
    return f"{clause} ({score_text(report, last)}{inside})"


def score_text(report: dict[str, Any], row: dict[str, Any]) -> str:
    """ "91.50 % of 10,000 images, 95 % interval 90.9-92.0" """
    scale = Scale.of(report)
    other = report.get("preparation", {}).get("inputs")  # what the model takes where that is no image
    things = report["settings"].get("samples_are") or ("samples" if other else "images")
    joint = "of" if scale.is_share else "on"
    samples = f" {joint} {row['samples']:,} {things}" if row.get("samples") else ""
    interval = f", 95 % interval {scale.span(row['score_interval'])}" if row.get("score_interval") else ""
    return scale.text(row["score"]) + samples + interval


def targets_clause(report: dict[str, Any]) -> str:
    """ "; the target for latency was MISSED by 0.06x (wanted 0.5x, got 0.56x)", or that all were met."""
    targets = report.get("targets", [])
    clauses = []
    for target in targets:
        if not target["met"]:
            by = missed_by(target) if target["got"] is not None else None
            missed = f"MISSED by {by}" if by else "MISSED"
            got = "it was not measured" if target["got"] is None else f"got {target['got']}"
            clauses.append(f"the target for {target['what']} was {missed} (wanted {target['wanted']}, {got})")
    if clauses:
        return "; " + " and ".join(clauses)
    if not targets:
        return ""
    return {1: "; the target was met", 2: "; both targets were met"}.get(
        len(targets), f"; all {len(targets)} targets were met"
    )
