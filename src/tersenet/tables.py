"""Latency tables that travel: filled on the device that will run the model, used by a search somewhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tersenet.report.words import percent
from tersenet.search.search import Search
from tersenet.search.table import Table
from tersenet.targets import Target, recipe_of
from tersenet.task import Task


def fill_table(model: nn.Module, task: Task, out: Path, runtime: str, threads: int, batch: int) -> dict[str, Any]:
    """Measures everything that a latency search of this model can ask for, and writes it.

    Returns:
        {"file", "device", "entries", "checks", "error", "fitted_error", "seconds"}; errors are medians, as shares.
    """
    recipe = recipe_of(
        target=Target(latency="1x"), data="random:", epochs=0, runtime=runtime, threads=threads, batch=batch
    )
    search = recipe.steps[0]
    assert isinstance(search, Search)
    table, costs, seconds = search.fill(model, task)
    network = table.networks
    Table(table.device, table.changes, network).write(out)
    return {
        "file": str(out), "device": table.device, "entries": len(table.changes), "checks": len(costs.checks),
        "error": costs.error, "fitted_error": costs.fitted_error, "seconds": seconds,
    }  # fmt: skip


def table_lines(found: dict[str, Any]) -> str:
    """The same in words."""
    device = found["device"]
    threads = f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}"
    return (
        f"{found['file']}: {found['entries']} entries for {device['runtime']} {device['version']} with {threads} at "
        f"batch {device['batch']} on {device['cpu']}; {found['checks']} random candidates were predicted to "
        f"{percent(found['error'])} (median)"
    )
