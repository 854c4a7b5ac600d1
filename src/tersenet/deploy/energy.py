"""Energy of a call: read from the processor's counters where the system lets them be read, else an estimate, so called.

Counters: Linux's powercap tree, where Intel and AMD processors (RAPL) count the microjoules of each package. They
count everything that the package did meanwhile, its idle power and its other cores included. Many systems keep them
from plain users (`/sys/class/powercap` readable by root alone), and virtual machines have none.

Estimate: operations and bytes times what each costs, from M. Horowitz, "Computing's energy problem", ISSCC 2014
(45 nm): an 8-bit multiply-add 0.23 pJ, one in 32-bit floats 4.6 pJ, a byte from DRAM 160 pJ. A newer process needs
less; the order of files is what such an estimate can tell, not their joules.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
MAC_PJ = {8: 0.23, 32: 4.6}  # by the bits of the numbers multiplied
BYTE_PJ = 160.0


@dataclass(frozen=True)
class Energy:
    """Joules of one call.

    Args:
        joules: of one call, of the whole batch.
        low, high: the 95 % interval over turns; None for an estimate.
        source: "counters" or "estimate".
        note: what it rests on, in words.
    """

    joules: float
    low: float | None
    high: float | None
    source: str
    note: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Counters:
    """The packages' counters.

    Args:
        packages: folders such as intel-rapl:0; parts of a package (intel-rapl:0:0) are counted in it already.
    """

    packages: tuple[Path, ...]

    @classmethod
    def find(cls, root: Path = POWERCAP) -> Counters | None:
        """None where there are none, or where they may not be read."""
        found = []
        for folder in sorted(root.glob("*-rapl:*")) if root.is_dir() else []:
            if folder.name.count(":") == 1:
                try:
                    _microjoules(folder)
                except (OSError, ValueError):
                    return None
                found.append(folder)
        return cls(tuple(found)) if found else None

    def read(self) -> tuple[int, ...]:
        """Microjoules so far, per package."""
        return tuple(_microjoules(folder) for folder in self.packages)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Between two readings, which must be closer than one round of the counter (minutes)."""
        spent = 0
        for folder, start, end in zip(self.packages, before, after, strict=True):
            spent += end - start if end >= start else end - start + int((folder / "max_energy_range_uj").read_text())
        return spent / 1e6


def estimate(macs: int, moved_bytes: int, bits: int = 32) -> Energy:
    """Energy of one call from what it does.

    Args:
        macs: multiply-adds of one call.
        moved_bytes: bytes read and written by one call.
        bits: 8 or 32, of the numbers that are multiplied.
    """
    joules = (macs * MAC_PJ[bits] + moved_bytes * BYTE_PJ) * 1e-12
    note = f"estimated from {macs:,} {bits}-bit multiply-adds and {moved_bytes:,} bytes moved, not measured"
    return Energy(joules, None, None, "estimate", note)


def _microjoules(folder: Path) -> int:
    return int((folder / "energy_uj").read_text())
