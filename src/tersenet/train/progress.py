"""What a person sees of a training, on standard error: a bar on a terminal, else one line per epoch."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Meter:
    """Running means over one epoch. On a GPU values are fetched in bunches, because each fetch waits for the device."""

    def __init__(self) -> None:
        self.loss, self.hits, self.seen, self.judged = 0.0, 0.0, 0, 0
        self.began, self.began_seen = time.perf_counter(), 0

    def state(self) -> list[float]:
        return [self.loss, self.hits, self.seen, self.judged]

    def load(self, state: list[float]) -> None:
        self.loss, self.hits, self.seen, self.judged = state[0], state[1], int(state[2]), int(state[3])
        self.began, self.began_seen = time.perf_counter(), self.seen

    def add(self, loss: float, hits: float | None, samples: int) -> None:
        """One batch: its mean loss, how many it got right (None where that means nothing), its size."""
        self.loss += loss * samples
        self.seen += samples
        if hits is not None:
            self.hits += hits
            self.judged += samples

    def values(self) -> dict[str, float]:
        """loss, accuracy (where it means something) and samples_per_s since the epoch began or went on."""
        values = {"loss": self.loss / max(1, self.seen)}
        if self.judged:
            values["accuracy"] = self.hits / self.judged
        elapsed = time.perf_counter() - self.began
        values["samples_per_s"] = (self.seen - self.began_seen) / max(elapsed, 1e-9)
        return values


class Display:
    """The bar or the lines. Shows nothing in any process but the first."""

    def __init__(self, epochs: int, batches: int, quiet: bool, first: bool) -> None:
        console = Console(stderr=True)
        self.epochs, self.batches, self.first = epochs, batches, first
        self.bar: Progress | None = None
        if first and not quiet and console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self.line = self.bar.add_task("training", total=epochs * batches, said="")

    def __enter__(self) -> Display:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def batch(self, epoch: int, index: int, meter: Meter) -> None:
        """Called after each batch; costs nothing without a terminal."""
        if self.bar is not None:
            self.bar.update(
                self.line,
                completed=epoch * self.batches + index + 1,
                description=f"epoch {epoch + 1}/{self.epochs}",
                said=_said(meter.values()),
            )

    def epoch(self, epoch: int, meter: Meter) -> None:
        """Called after each epoch."""
        if not self.first:
            return
        text = f"epoch {epoch + 1}/{self.epochs}: {_said(meter.values())}"
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _said(values: dict[str, float]) -> str:
    text = f"loss {values['loss']:.4f}"
    if "accuracy" in values:
        text += f", accuracy {values['accuracy']:.2%}"
    return text + f", {values['samples_per_s']:,.0f} samples/s"
