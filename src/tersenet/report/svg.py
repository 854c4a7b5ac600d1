"""Inline SVG: elements, text and axes, drawn with the page's CSS variables so that light and dark mode are followed.

A drawing is a string that can be put into an HTML page as it is: all text is escaped, nothing is loaded from elsewhere,
and what is shown when an element is pointed at is its <title>. Lengths are those of the view box; the page scales it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

FONT = 11.5
# The mean width of a character at that size; wide enough for capitals and digits.
LETTER = 6.3
_SHAPES = 5


def number(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".removesuffix(".0")


def element(name: str, inside: str = "", tip: str | None = None, **attributes: str | float | None) -> str:
    """One element; `class_` is the attribute class, and an underscore in a name is a hyphen."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value if isinstance(value, str) else number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    title = "" if tip is None else f"<title>{escape(tip)}</title>"
    return f"<{name}{said}>{title}{inside}</{name}>"


def text(
    x: float, y: float, said: str, anchor: str = "start", class_: str | None = None, transform: str | None = None
) -> str:
    return element("text", escape(said), x=x, y=y, text_anchor=anchor, class_=class_, transform=transform)


def line(x1: float, y1: float, x2: float, y2: float, class_: str, stroke: str | None = None) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_, stroke=stroke)


def drawing(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """The whole picture, named for those who do not see it."""
    return (
        f'<svg class="plot" viewBox="0 0 {number(width)} {number(height)}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def width_of(said: str) -> float:
    """About how wide a text is."""
    return LETTER * len(said)


def cut(said: str, width: float) -> str:
    """A text that fits a width, with an ellipsis where it was cut."""
    room = max(2, int(width / LETTER))
    return said if len(said) <= room else said[: room - 1].rstrip() + "…"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high: steps of 1, 2 or 5 times a power of ten.

    >>> ticks(0, 4.7), ticks(97.2, 99.6), ticks(-1.5, 0.4)
    ([0.0, 1.0, 2.0, 3.0, 4.0], [97.5, 98.0, 98.5, 99.0, 99.5], [-1.5, -1.0, -0.5, 0.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    digits = max(0, 1 - math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, digits) + 0.0 for place in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """
    >>> tick_text(0.5, 0.5), tick_text(20.0, 10.0), tick_text(0.05, 0.01)
    ('0.5', '20', '0.05')
    """
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


@dataclass(frozen=True)
class Axis:
    """Values to places along one direction; places may fall while values rise, as upward on a screen."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def labelled(self, count: int) -> list[tuple[float, str]]:
        """(place, text) of each tick."""
        values = ticks(self.low, self.high, count)
        step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
        return [(self(value), tick_text(value, step)) for value in values]


def across(axis: Axis, top: float, bottom: float, title: str, count: int = 5) -> list[str]:
    """A horizontal axis under the picture: grid lines, numbers, and what they count, which keeps within the
    picture where it is wider than the axis."""
    found = []
    for place, said in axis.labelled(count):
        found += [line(place, top, place, bottom, "grid"), text(place, bottom + FONT + 3, said, "middle")]
    half = width_of(title) / 2
    middle = max(half, min((axis.start + axis.end) / 2, axis.end + 44 - half))
    return [*found, text(middle, bottom + 2 * FONT + 9, title, "middle", "axis")]


def upward(axis: Axis, left: float, right: float, title: str, at: float, count: int = 5) -> list[str]:
    """A vertical axis at the left: grid lines, numbers, and what they count, written upward at x = `at`."""
    found = []
    for place, said in axis.labelled(count):
        found += [line(left, place, right, place, "grid"), text(left - 6, place + FONT / 3, said, "end")]
    middle = (axis.start + axis.end) / 2
    turned = f"rotate(-90 {number(at)} {number(middle)})"
    return [*found, text(at, middle, title, "middle", "axis", transform=turned)]


def marker(x: float, y: float, shape: int, color: str, size: float = 4.5) -> str:
    """A point: circle, diamond, square, triangle or cross, so that runtimes differ without their colors, too."""
    r, kind = size, shape % _SHAPES
    if kind == 0:
        return element("circle", cx=x, cy=y, r=r, fill=color)
    corners: Sequence[Sequence[tuple[float, float]]] = (
        ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        ((-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)),
        ((0, -1.2), (1.2, 0.95), (-1.2, 0.95)),
        (
            *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
            *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
        ),
    )
    points = " ".join(f"{number(x + r * dx)},{number(y + r * dy)}" for dx, dy in corners[kind - 1])
    return element("polygon", points=points, fill=color)
