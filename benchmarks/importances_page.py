"""The table and the plot of benchmarks/importances.py, from its results."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import numpy as np

BLOCK = re.compile(r"(<!-- importances -->\n).*?(<!-- end -->)", re.DOTALL)
ROW, LEFT, PANEL, GAP, TOP = 22, 118, 200, 24, 64


def names(found: dict[str, Any]) -> list[str]:
    """Importances that have every figure, the best with repair at the middle share first."""
    settings = found["settings"]
    every = dict.fromkeys(key.split()[0] for key in found["scores"])
    whole = [
        name
        for name in every
        if all(f"{name} {seed}" in found["costs"] for seed in range(settings["seeds"]))
        and all(len(values(found, name, share, kind)) == settings["seeds"]
                for share in settings["shares"] for kind in ("bare", "repaired"))
    ]  # fmt: skip
    middle = settings["shares"][len(settings["shares"]) // 2]
    return sorted(whole, key=lambda name: -float(np.mean(values(found, name, middle, "repaired"))))


def values(found: dict[str, Any], name: str, share: float, kind: str) -> list[float]:
    """Scores in percent, one per seed."""
    keys = [f"{name} {share} {kind} {seed}" for seed in range(found["settings"]["seeds"])]
    return [100 * found["scores"][key]["score"] for key in keys if key in found["scores"]]


def table(found: dict[str, Any]) -> str:
    """Markdown: mean of the seeds, with the least and the greatest where they differ."""
    settings = found["settings"]
    shares = [f"{100 * share:.0f} %" for share in settings["shares"]]
    head = [f"{share} {kind}" for kind in ("gone", "gone, repaired") for share in shares]
    lines = [
        f"| importance | {' | '.join(head)} | rank corr., all | within a layer | seconds |",
        "|---|" + "---:|" * (len(head) + 3),
    ]
    for name in names(found):
        cells = [
            span(values(found, name, share, kind), 1) for kind in ("bare", "repaired") for share in settings["shares"]
        ]
        costs = [found["costs"][f"{name} {seed}"] for seed in range(settings["seeds"])]
        cells += [span([cost[what] for cost in costs], 2) for what in ("overall", "within", "seconds")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Accuracy in percent on {settings['test_samples']:,} test images (the original: "
        f"{100 * found['original']:.2f}), mean of {settings['seeds']} seeds, with the least and the greatest in "
        f"parentheses. Rank correlation (Spearman) with the change of the loss on {settings['held_out']:,} held-out, "
        f"augmented training images when a channel goes alone. On {found['machine']['cpu']}.",
    ]
    return "\n".join(lines) + "\n"


def span(numbers: list[float], digits: int) -> str:
    low, mean, high = (f"{value:.{digits}f}" for value in (min(numbers), float(np.mean(numbers)), max(numbers)))
    return mean if low == high else f"{mean} ({low} to {high})"


def put_in(page: str, text: str) -> str:
    """The page with its block filled anew."""
    if not BLOCK.search(page):
        raise SystemExit("the page has no block '<!-- importances -->' ... '<!-- end -->'; add it where the table goes")
    return BLOCK.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", page)


def plot(found: dict[str, Any]) -> str:
    """SVG: a panel per share, a row per importance; a ring without repair, a dot with it, lines from seed to seed."""
    order, shares = names(found), found["settings"]["shares"]
    width = LEFT + len(shares) * (PANEL + GAP)
    height = TOP + ROW * len(order) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="8" y="20" fill="#222" font-size="14">ResNet-20 on CIFAR-10, channels gone, no training: accuracy (%)'
        "</text>",
        '<circle cx="14" cy="38" r="4" fill="none" stroke="#b3541e" stroke-width="1.6"/>'
        '<text x="24" y="42" fill="#444">as cut</text>',
        '<circle cx="84" cy="38" r="4" fill="#1f6f8b"/>'
        '<text x="94" y="42" fill="#444">repaired by least squares</text>',
    ]
    for row, name in enumerate(order):
        y = TOP + ROW * row + ROW / 2
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end" fill="#222">{escape(name)}</text>')
    for number, share in enumerate(shares):
        parts += panel(found, order, share, LEFT + number * (PANEL + GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(found: dict[str, Any], order: list[str], share: float, left: float) -> list[str]:
    """One share: grid lines every 20 points, and the marks."""

    def x(value: float) -> float:
        return round(left + PANEL * value / 100, 1)

    bottom = TOP + ROW * len(order)
    parts = [
        f'<text x="{left + PANEL / 2}" y="{TOP - 6}" text-anchor="middle" fill="#222">{100 * share:.0f} % gone</text>'
    ]
    for value in range(0, 101, 20):
        parts.append(f'<line x1="{x(value)}" x2="{x(value)}" y1="{TOP}" y2="{bottom}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{x(value)}" y="{bottom + 16}" text-anchor="middle" fill="#666">{value}</text>')
    for row, name in enumerate(order):
        y = TOP + ROW * row + ROW / 2
        for kind, look in (
            ("bare", 'fill="#ffffff" stroke="#b3541e" stroke-width="1.6"'),
            ("repaired", 'fill="#1f6f8b"'),
        ):
            scores = values(found, name, share, kind)
            colour = "#b3541e" if kind == "bare" else "#1f6f8b"
            parts.append(f'<line x1="{x(min(scores))}" x2="{x(max(scores))}" y1="{y}" y2="{y}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{x(float(np.mean(scores)))}" cy="{y}" r="4" {look}/>')
    return parts
