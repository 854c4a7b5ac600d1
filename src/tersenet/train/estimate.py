"""How long a training will take, said once it can be known, and refused when that is more than was allowed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tersenet.errors import SettingsError

_SKIPPED, _MEASURED = 5, 15  # the first batches allocate


class Estimate:
    """Watches the first batches of a training.

    Args:
        batches: that are still to be done, and per epoch.
        limit_hours: what is allowed; None allows everything.
        quiet: say nothing.
        clock: seconds; another one is for tests.
    """

    def __init__(
        self,
        batches: int,
        per_epoch: int,
        limit_hours: float | None,
        quiet: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.batches, self.per_epoch, self.limit, self.quiet, self.clock = batches, per_epoch, limit_hours, quiet, clock
        self.done, self.began = 0, 0.0

    def batch(self) -> None:
        """Called after each batch.

        Raises:
            SettingsError: when the training would take longer than allowed; says how many epochs would fit.
        """
        self.done += 1
        if self.done == _SKIPPED:
            self.began = self.clock()
        if self.done != _SKIPPED + _MEASURED:
            return
        seconds = (self.clock() - self.began) / _MEASURED
        hours = seconds * (self.batches - self.done) / 3600
        if self.limit is not None and hours > self.limit:
            fitting = int(self.limit * 3600 / (seconds * self.per_epoch))
            raise SettingsError(
                f"this training would take about {duration(hours)}, and max_hours is {self.limit:g}; "
                + (f"{fitting} epochs would fit" if fitting else "not one epoch would fit")
            )
        if not self.quiet:
            print(f"about {duration(hours)} of training", file=sys.stderr, flush=True)


def duration(hours: float) -> str:
    """
    >>> duration(2.52), duration(0.5), duration(0.001)
    ('2.5 h', '30 min', '4 s')
    """
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
