"""A task's own metric: of samples (their mean is the score) or of a whole set, such as mAP and mIoU.

Interval of a score of samples: normal, from their spread. Of a whole set: percentile bootstrap over the samples
(B. Efron, "Bootstrap methods", Ann. Stat. 7, 1979).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet.errors import DataError, SettingsError
from tersenet.numerics.scale import Scale

# Rounding in the last digits of a mean is no reason to refuse a share.
_ROUNDING = 1e-6
# An interval of fewer resamples that gave a number says too little.
_ENOUGH = 0.9


@dataclass(frozen=True)
class Metric:
    """What a model is scored by, with what is needed to write it down.

    Args:
        update: (outputs, batch) -> what each sample of the batch contributes, in order: (N,) scores, (N, ...) numbers
            such as a confusion matrix per image, or a list of N values of any kind.
        compute: all contributions, as one tensor (or list) over the set -> the score; None takes the mean.
        name: as papers write it, such as "mAP", "mIoU" or "MAE".
        unit: "%" for shares from 0 to 1, which are shown in percent; else such as "px" or "dB", or "" for none.
        higher_is_better: the direction; a loss is always what is worse.
        resamples: of the bootstrap interval of a score with `compute`, which is called so often; 0 gives no interval.
    """

    update: Callable[[Any, Any], Tensor | Sequence[Any]]
    compute: Callable[[Any], Any] | None = None
    name: str = "score"
    unit: str = "%"
    higher_is_better: bool = True
    resamples: int = 200

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise SettingsError("the name of a metric is empty; give it one, such as name='mAP'")
        if self.resamples < 0:
            raise SettingsError(f"resamples is {self.resamples}; give 0 (no interval) or more, such as 200")

    @property
    def scale(self) -> Scale:
        return Scale(self.name, self.unit, self.higher_is_better)

    def score(self, parts: Sequence[Any]) -> tuple[float, float | None, float | None]:
        """(value, low, high) with a 95 % interval, of the contributions of all samples; low and high are None where
        there is no interval.

        Args:
            parts: what `update` gave, of each batch, at least one sample in all.
        Raises:
            DataError: where the score is NaN, or no share although its unit is "%".
        """
        gathered = _gathered(parts)
        value, low, high = self._of_samples(gathered) if self.compute is None else self._of_set(gathered)
        if math.isnan(value):
            raise DataError(f"the metric {self.name!r} gives NaN, so that there is no score; it must give a number")
        return value, low, high

    def _of_samples(self, gathered: Any) -> tuple[float, float, float]:
        values = gathered if isinstance(gathered, Tensor) else torch.tensor([float(each) for each in gathered])
        values = values.double().flatten()
        self._check_share(float(values.min()), float(values.max()))
        mean, n = float(values.mean()), len(values)
        half = 1.96 * float(values.std()) / n**0.5 if n > 1 else 0.0
        return mean, mean - half, mean + half

    def _of_set(self, gathered: Any) -> tuple[float, float | None, float | None]:
        assert self.compute is not None
        value, n = float(self.compute(gathered)), len(gathered)
        self._check_share(value, value)
        draws = np.random.default_rng(0).integers(0, n, (self.resamples, n))
        found = np.array([self._of_draw(_taken(gathered, draw)) for draw in draws])
        found = found[np.isfinite(found)]
        if n < 2 or not self.resamples or len(found) < _ENOUGH * self.resamples:
            return value, None, None
        low, high = (float(end) for end in np.quantile(found, (0.025, 0.975)))
        return value, min(low, value), max(high, value)

    def _of_draw(self, gathered: Any) -> float:
        """NaN where a draw lacks what the metric needs, such as a class."""
        assert self.compute is not None
        try:
            return float(self.compute(gathered))
        except Exception:  # noqa: BLE001 - the user's code raises what it likes on what it cannot compute
            return math.nan

    def _check_share(self, low: float, high: float) -> None:
        if self.unit == "%" and not (low >= -_ROUNDING and high <= 1 + _ROUNDING) and not math.isnan(low + high):
            raise DataError(
                f"the metric {self.name!r} gives values from {low:.4g} to {high:.4g}, and a share lies between 0 and "
                "1; say what it is counted in, such as Task(metric=tersenet.Metric(function, name='MAE', unit='px', "
                "higher_is_better=False)), or unit='' for none"
            )


def metric_of(metric: Metric | Callable[[Any, Any], Tensor]) -> Metric:
    """A metric; a plain function gives shares, higher is better, and its name is that of the metric."""
    if isinstance(metric, Metric):
        return metric
    name = getattr(metric, "__name__", "score") if inspect.isfunction(metric) else "score"
    return Metric(metric, name="score" if name.startswith("<") else name.replace("_", " ").strip() or "score")


def contribution(metric: Metric, outputs: Any, batch: Any) -> Tensor | list[Any]:
    """What the samples of a batch contribute, kept on the CPU."""
    part = metric.update(outputs, batch)
    if isinstance(part, Tensor) and part.dim() == 0:
        raise DataError(
            f"the metric {metric.name!r} gives one number for a batch; give one for each sample, (N,), or for a score "
            "of the whole set Metric(update, compute=...)"
        )
    return part.detach().cpu() if isinstance(part, Tensor) else list(part)


def _gathered(parts: Sequence[Any]) -> Any:
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(list(parts))
    return [each for part in parts for each in part]


def _taken(gathered: Any, draw: np.ndarray) -> Any:
    return gathered[torch.from_numpy(draw)] if isinstance(gathered, Tensor) else [gathered[i] for i in draw]
