"""What a score is counted in: the metric's name, its unit, and which direction is better.

A share from 0 to 1 has the unit "%": it is shown in percent and its losses in points (percentage points). Any other
score is shown as it is, and its losses in its own unit. A loss is positive where the score became worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Losses below these are called none: of points, and of any other score as a part of it.
_NO_POINTS = 0.005
_NO_PART = 5e-4


@dataclass(frozen=True)
class Scale:
    """Name, unit and direction of a metric, and how its values are written."""

    name: str = "accuracy"
    unit: str = "%"
    higher_is_better: bool = True

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Scale:
        """That of a report; a report without one is of accuracy."""
        return cls(**report.get("metric", {}))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def is_share(self) -> bool:
        return self.unit == "%"

    @property
    def loss_unit(self) -> str:
        """What losses are counted in; empty for a metric without a unit."""
        return "points" if self.is_share else self.unit

    @property
    def head(self) -> str:
        """
        >>> Scale().head, Scale("MAE", "px", False).head
        ('accuracy', 'MAE, lower is better')
        """
        return self.name if self.higher_is_better else f"{self.name}, lower is better"

    @property
    def title(self) -> str:
        """
        >>> Scale().title, Scale("mIoU").title
        ('Accuracy', 'mIoU')
        """
        return self.name[:1].upper() + self.name[1:] if self.name.islower() else self.name

    @property
    def heading(self) -> str:
        """
        >>> Scale().heading, Scale("error", "px", False).heading
        ('Accuracy', 'Error, lower is better')
        """
        return self.title + self.head.removeprefix(self.name)

    def lost(self, before: float, after: float) -> float:
        """How much worse `after` is, in `loss_unit`; negative where it is better."""
        return (before - after if self.higher_is_better else after - before) * (100 if self.is_share else 1)

    def same(self, before: float, after: float) -> bool:
        """Whether the difference is too small to be called a loss or a gain."""
        lost = abs(self.lost(before, after))
        return lost < (_NO_POINTS if self.is_share else max(_NO_PART * abs(before), 1e-12))

    def worse(self, interval: Sequence[float], before: float) -> bool:
        """Whether a whole interval is worse than `before`."""
        return interval[1] < before if self.higher_is_better else interval[0] > before

    def text(self, value: float) -> str:
        """
        >>> Scale().text(0.915), Scale("MAE", "px", False).text(3.21987), Scale("PSNR", "").text(-0.5)
        ('91.50 %', '3.22 px', '-0.5')
        """
        return f"{100 * value:.2f} %" if self.is_share else f"{value:.4g} {self.unit}".rstrip()

    def number(self, value: float) -> float:
        """The value in its unit, as an axis shows it."""
        return 100 * value if self.is_share else value

    def span(self, interval: Sequence[float]) -> str:
        """
        >>> Scale().span([0.9094, 0.9203]), Scale("MAE", "px", False).span([3.1, 3.3]), Scale("x", "").span([-1, 2])
        ('90.9-92.0', '3.1-3.3', '-1 to 2')
        """
        low, high = (f"{100 * end:.1f}" if self.is_share else f"{end:.4g}" for end in interval)
        return f"{low} to {high}" if "-" in low + high else f"{low}-{high}"

    def loss_number(self, lost: float) -> str:
        """
        >>> Scale().loss_number(0.234), Scale().loss_number(-0.0001), Scale("MAE", "px", False).loss_number(0.12345)
        ('0.23', '0.00', '0.123')
        """
        if not self.is_share:
            return f"{lost:.3g}"
        return "0.00" if abs(lost) < _NO_POINTS else f"{lost:.2f}"

    def loss_text(self, lost: float) -> str:
        """
        >>> Scale().loss_text(0.5), Scale("MAE", "px", False).loss_text(0.5), Scale("F", "").loss_text(0.5)
        ('0.50 points', '0.5 px', '0.5')
        """
        return f"{self.loss_number(lost)} {self.loss_unit}".rstrip()


ACCURACY = Scale()
