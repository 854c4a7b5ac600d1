"""What `precision: auto` means here: bf16 mixed where it is faster, found by trying it on a copy of the model.

Whether a CPU is faster in bf16 depends on its instructions (AMX, AVX512-BF16) and on the network's shapes, so a few
real batches are timed in both. GPUs with bf16 are always faster with it. Several processes on the CPU train in
32-true, because their timings could disagree.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tersenet.errors import TersenetError

FLOAT, MIXED = "32-true", "bf16-mixed"
# bf16 rounds, so it must be worth it: by more than 10 %.
_LEAST_GAIN = 1.1
# Timed batches of each precision, after one that is not counted; fewer where these many seconds are over.
_TURNS, _SECONDS = 3, 20.0


@dataclass(frozen=True)
class Chosen:
    """A precision and how it was found.

    Args:
        precision: as Fabric takes it.
        gain: seconds of a batch in fp32 over those in bf16; None where nothing was timed.
    """

    precision: str
    gain: float | None = None

    def said(self) -> str:
        """
        >>> Chosen("bf16-mixed", 1.62).said(), Chosen("32-true", 0.8).said(), Chosen("bf16-mixed").said()
        ('training in bf16-mixed (1.6x faster here)', 'training in 32-true (bf16-mixed is 0.8x as fast here)', \
'training in bf16-mixed')
        """
        if self.gain is None:
            return f"training in {self.precision}"
        if self.precision == MIXED:
            return f"training in {MIXED} ({self.gain:.1f}x faster here)"
        return f"training in {FLOAT} ({MIXED} is {self.gain:.1f}x as fast here)"


def for_device(device: torch.device, processes: int) -> Chosen | None:
    """The choice where nothing need be timed; None where it must be: one process on the CPU."""
    if device.type == "cuda":
        return Chosen(MIXED if torch.cuda.is_bf16_supported(including_emulation=False) else FLOAT)
    return None if device.type == "cpu" and processes == 1 else Chosen(FLOAT)


def faster(once: Callable[[str], None], clock: Callable[[], float] = time.perf_counter) -> Chosen:
    """Times both precisions in turns.

    Args:
        once: trains on one batch in a precision.
        clock: seconds; another one is for tests.
    """
    started = clock()
    # The best of each: what disturbs a timing only adds to it.
    best = {FLOAT: float("inf"), MIXED: float("inf")}
    try:
        for precision in best:
            once(precision)
        for turn in range(_TURNS):
            for precision in best:
                began = clock()
                once(precision)
                best[precision] = min(best[precision], clock() - began)
            if turn and clock() - started > _SECONDS:
                break
    except (RuntimeError, TersenetError):
        # An operator without bf16, or a loss that is no number in it; what is wrong in fp32 too, the training will say.
        return Chosen(FLOAT)
    gain = best[FLOAT] / max(best[MIXED], 1e-9)
    return Chosen(MIXED if gain > _LEAST_GAIN else FLOAT, gain)


@contextlib.contextmanager
def unsaid() -> Iterator[None]:
    """Keeps Fabric from announcing the precision on standard error; warnings still come."""
    log = logging.getLogger("lightning_fabric.utilities.rank_zero")
    was = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(was)
