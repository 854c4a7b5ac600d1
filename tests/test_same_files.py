"""A step that changes nothing ships the files of the row before it, which are written, checked and timed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet import compress, prove
from tersenet.graph import agreement
from tersenet.graph.agreement import compared_once
from tersenet.graph.trace import trace
from tersenet.task import Task

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """No norm, so that there is nothing to fold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)).mean((2, 3)))


def test_a_step_that_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    timed: list[list[str]] = []
    real = prove.time_files

    def time_files(files: Any, *given: Any, **settings: Any) -> Any:
        timed.append(list(files))
        return real(files, *given, **settings)

    monkeypatch.setattr(prove, "time_files", time_files)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nsteps:\n- fold_batch_norm: {}\n- prune_channels: {sparsity: 0.5}\n- fold_batch_norm: {}\n"
        "- prune_weights: {sparsity: 0.5}\n"
    )
    task = Task(example=X[:2], calibrate=[(X,)], quiet=True)
    with pytest.warns(match="matched no layer"):
        run = compress(Net().eval(), task, str(recipe), out=tmp_path / "run")
    assert timed == [["original", "2. prune_channels", "4. prune_weights"]]
    stems = {path.stem for path in (tmp_path / "run" / "files").iterdir()}
    assert stems == {"00-original", "02-prune_channels", "04-prune_weights"}
    rows = run.rows
    for first, second in ((0, 1), (2, 3)):
        for key in ("macs", "params", "file_bytes", "latency_ms"):
            assert rows[first][key] == rows[second][key]
    assert rows[1]["macs"] > rows[2]["macs"]
    assert "left_interval" in rows[3]["latency_ms"]["onnxruntime"]


def test_a_graph_is_compared_once_for_each_set_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    real = agreement.run
    monkeypatch.setattr(agreement, "run", lambda *given: runs.append(given) or real(*given))
    model = Net().eval()
    trace(model, X[:2])  # captures

    def compared() -> bool:
        runs.clear()
        trace(model, X[:2])
        return bool(runs)

    assert compared()
    with compared_once():
        assert [compared(), compared()] == [True, False]
        with torch.no_grad():
            model.first.weight[0, 0, 0, 0] += 1
        assert [compared(), compared()] == [True, False]
        model.head.bias.data[0] = 7  # which counts no version
        assert [compared(), compared()] == [True, False]
    assert [compared(), compared()] == [True, True]
