"""What a measurement says: latencies, ratios and how far to trust them.

Calls within one turn share whatever the machine was doing just then, so they are not independent, and a bootstrap over
single calls would claim an interval several times too narrow. What is resampled is the turn: each turn is one
median, and each interval is the percentile bootstrap of `tersenet.numerics.intervals` over those. A ratio is taken
within each turn first, because the machine's drift is the same for both there.

Where memory came to lie when a file was opened makes up to a tenth of a call of some milliseconds, and stays so as
long as the file is open. Turns of one opening share that: where files were opened several times, openings are drawn
first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tersenet.deploy.energy import Energy
from tersenet.deploy.footprint import Footprint
from tersenet.deploy.warm import Warmed
from tersenet.errors import SettingsError
from tersenet.numerics.intervals import bootstrap_median

NOT_SLOWER = 1.02
_TURNED = {"median": "median", "low": "high", "high": "low"}  # the longest time is the lowest rate
Key = str | tuple[str, str]


@dataclass(frozen=True)
class Ratio:
    """Time of one over time of another, with its 95 % bootstrap interval; below 1 the first is faster."""

    ratio: float
    low: float
    high: float

    @property
    def difference(self) -> str:
        """ "faster" or "slower" where the interval says so, and else "none shown"."""
        return "faster" if self.high < 1 else "slower" if self.low > 1 else "none shown"


@dataclass(frozen=True)
class Measurement:
    """What one run measured: the median of each turn of each contender, milliseconds a call.

    A contender is named by (name, runtime), or by its name alone where that is unique. Footprints, energies and
    warm-ups are there where each contender had its own process. `openings`: so many equal parts of the turns, one after
    the other, in each of which the files were opened anew.
    """

    turns: Mapping[tuple[str, str], np.ndarray]
    threads: int = 1
    batch: int = 1
    machine: Mapping[str, Any] = field(default_factory=dict)
    footprints: Mapping[tuple[str, str], Footprint] = field(default_factory=dict)
    energies: Mapping[tuple[str, str], Energy] = field(default_factory=dict)
    warmed: Mapping[tuple[str, str], Warmed] = field(default_factory=dict)
    openings: int = 1

    @property
    def names(self) -> set[str]:
        """Of the contenders, in any runtime."""
        return {name for name, _ in self.turns}

    def latency(self, contender: Key) -> dict[str, Any]:
        """Milliseconds of one call: {"median", "low", "high", "threads", "batch"}; the median is over the turns."""
        median, low, high = bootstrap_median(self.turns[self._key(contender)], groups=self.openings)
        return {"median": median, "low": low, "high": high, "threads": self.threads, "batch": self.batch}

    def peak_bytes(self, contender: Key) -> int | None:
        """Bytes of memory at the peak, beyond the runtime's own; None where that was not measured."""
        found = self.footprints.get(self._key(contender))
        return None if found is None else found.peak_bytes

    def throughput(self, contender: Key) -> dict[str, Any]:
        """Samples a second at this batch: {"median", "low", "high", "threads", "batch"}."""
        found = self.latency(contender)
        rates = {name: 1e3 * self.batch / found[other] for name, other in _TURNED.items()}
        return {**rates, "threads": self.threads, "batch": self.batch}

    def ratio(self, a: Key, b: Key) -> Ratio:
        """Time of `a` over time of `b`, paired by turn: below 1 means that `a` is faster."""
        return Ratio(*bootstrap_median(self.turns[self._key(a)] / self.turns[self._key(b)], groups=self.openings))

    def not_slower(self, a: Key, b: Key) -> bool:
        """Whether `a` is not slower than `b`: the ratio's interval does not lie above 1.02."""
        return self.ratio(a, b).low <= NOT_SLOWER

    @property
    def noise(self) -> float:
        """Half the width of the widest interval, as a share: of the ratios, or of the latency of a lone contender."""
        keys = list(self.turns)
        pairs = [self.ratio(a, b) for i, a in enumerate(keys) for b in keys[i + 1 :]]
        widths = [(each.high - each.low) / (2 * each.ratio) for each in pairs]
        if not widths:
            alone = self.latency(keys[0])
            widths = [(alone["high"] - alone["low"]) / (2 * alone["median"])]
        return max(widths)

    @property
    def verdict(self) -> str:
        """What this run can tell apart, in words."""
        percent = max(1, math.ceil(round(100 * self.noise, 6)))
        if self.noise > NOT_SLOWER - 1:
            return f"this machine is too noisy to tell {percent} %; measure again when it is quiet, or with more turns"
        restless = [name for (name, _), each in self.warmed.items() if not each.stable]
        if restless:
            return f"differences above {percent} % can be told apart, but the time of {restless[0]} had not settled"
        return f"differences above {percent} % can be told apart"

    def to_json(self) -> dict[str, Any]:
        """As design.md, section 3: per file its latency in each runtime, and the ratios within each runtime."""
        files: dict[str, dict[str, Any]] = {}
        for name, runtime in self.turns:
            entry = files.setdefault(name, {"latency_ms": {}})
            entry["latency_ms"][runtime] = self.latency((name, runtime))
            entry.setdefault("samples_per_s", {})[runtime] = self.throughput((name, runtime))
            if (warmed := self.warmed.get((name, runtime))) is not None:
                entry.setdefault("warm_up", {})[runtime] = {"calls": warmed.calls, "stable": warmed.stable}
            if (energy := self.energies.get((name, runtime))) is not None:
                entry.setdefault("energy", {})[runtime] = energy.to_json()
            cost = self.footprints.get((name, runtime))
            if cost is not None:
                for field_name, value in cost.to_json().items():
                    entry.setdefault(field_name, value)  # a file's own figures are those of the first runtime named
                entry.setdefault("footprint", {})[runtime] = cost.to_json()
        return {
            "machine": dict(self.machine),
            "openings": self.openings,
            "files": files,
            "ratios": self._ratios(),
            "noise": self.noise,
            "verdict": self.verdict,
        }

    def _ratios(self) -> list[dict[str, Any]]:
        keys = list(self.turns)
        found = []
        for i, b in enumerate(keys):
            for a in keys[i + 1 :]:
                if a[1] == b[1]:
                    each = self.ratio(a, b)
                    found.append(
                        {
                            "a": a[0],
                            "b": b[0],
                            "runtime": a[1],
                            "ratio": each.ratio,
                            "low": each.low,
                            "high": each.high,
                            "difference": each.difference,
                        }
                    )
        return found

    def _key(self, contender: Key) -> tuple[str, str]:
        found = [key for key in self.turns if contender in (key, key[0])]
        if len(found) != 1:
            known = ", ".join(f"{name} in {runtime or 'Python'}" for name, runtime in self.turns)
            raise SettingsError(f"{contender!r} names {len(found)} contenders, must name one of {known}")
        return found[0]


def joined(parts: Sequence[Measurement]) -> Measurement:
    """One measurement of several openings of the same files; what opening and warming up cost is the first's.

    Turns that others have fewer of (single calls of cold caches are as many as fit) are left out.
    """
    first, least = parts[0], min(len(values) for part in parts for values in part.turns.values())
    turns = {key: np.concatenate([part.turns[key][:least] for part in parts]) for key in first.turns}
    return replace(first, turns=turns, openings=len(parts))
