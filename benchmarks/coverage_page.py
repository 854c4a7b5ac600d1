"""docs/coverage.md from the results of coverage.py."""

from __future__ import annotations

from typing import Any

import numpy as np


def passed(row: dict[str, Any]) -> bool:
    return bool(row.get("same_shapes")) and row.get("difference", 1.0) < 1e-2


def page(log: dict[str, Any], wanted: list[str]) -> str:
    """docs/coverage.md."""
    rows = {name: log["networks"][name] for name in wanted if name in log["networks"]}
    good = {name: row for name, row in rows.items() if passed(row)}
    times = [row["parameters"] / row["left"] for row in good.values()]
    seconds = [row["coupling_seconds"] + row["cut_seconds"] for row in good.values()]
    lines = [
        "# Coverage: half of all channels",
        "",
        "Made by `python benchmarks/coverage.py`. Every network has random weights and its own input size; half of",
        "the channels of every bundle go by chance, residual ones too. It passes when it runs, its outputs have their",
        "old shapes, and they are those of the uncut network with zeros in place of the removed channels (norms over",
        "channels see what is left). Seconds of one processor core: coupling, its trial and the cut, besides",
        "`torch.export`.",
        "What stays: share of the parameters in layers of which nothing can go, by reason; the layers that make the",
        "outputs are not counted. Of networks with fewer than 2.5 times fewer it is said what has channels on one side",
        "only and so keeps half, where a weight between channels keeps a quarter (the layer of the outputs, norms,",
        "biases, depthwise kernels), and what half of all channels that can go could leave at most.",
        "",
        f"**{len(good)} of {len(rows)} pass** (the list has {len(wanted)}). "
        f"Parameters: {np.median(times):.2f} times fewer (median), "
        f"{sum(t >= 2.5 for t in times)} networks at least 2.5 times. Seconds: median {np.median(seconds):.1f}, "
        f"longest {max(seconds):.1f}."
        if good
        else "Nothing passes.",
        "",
        "| network | parameters (M) | left (M) | times fewer | seconds | export | what stays, and why |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in rows.items():
        if "left" not in row:
            lines.append(f"| {name} | | | | | | **fails**: {_cell(row.get('error', ''))} |")
            continue
        why = "; ".join(f"{share:.1%} {_cell(reason)}" for reason, share in list(row["stays"].items())[:3])
        if row["parameters"] / row["left"] < 2.5 and "at_most" in row:
            sides = ", ".join(f"{share:.1%} {kind}" for kind, share in row["one_sided"].items() if share >= 0.01)
            why = "; ".join(filter(None, [why, f"channels on one side only: {sides}; {row['at_most']:.2f} at most"]))
        bad = "" if passed(row) else "**wrong outputs** " if row["same_shapes"] else "**other output shapes** "
        seconds_here = row["coupling_seconds"] + row["cut_seconds"]
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} | {row['left'] / 1e6:.2f} "
            f"| {row['parameters'] / row['left']:.2f} | {seconds_here:.1f} | {row['export_seconds']:.1f} | {bad}{why} |"
        )
    found: dict[str, list[float]] = {}
    for row in rows.values():
        for reason, share in row.get("stays", {}).items():
            found.setdefault(reason, []).append(share)
    lines += ["", "## Reasons, by number of networks", "", "| networks | median share | reason |", "|---:|---:|---|"]
    lines += [
        f"| {len(shares)} | {np.median(shares):.1%} | {_cell(reason)} |"
        for reason, shares in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
