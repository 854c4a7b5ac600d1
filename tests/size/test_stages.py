"""The stages of Deep Compression, each counted another way here."""

from __future__ import annotations

import copy

import pytest
import torch

from cases import task_for, tiny
from tersenet.codec.estimate import coded_bytes
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.size.share_weights import ShareWeights
from tersenet.size.stages import as_dicts, stages, table


def test_every_stage_is_smaller_and_counts_what_it_says() -> None:
    model = tiny()
    task = task_for(model)
    pruned, _ = PruneWeights(sparsity=0.8).run(model, task)
    shared, _ = ShareWeights(bits=3).run(copy.deepcopy(pruned), task)
    rows = stages(pruned, shared, task, max_drop=5.0)
    layers = {path: shared.get_submodule(path).weight.detach() for path in ("conv1", "conv2", "pointwise", "linear")}
    layers |= {path: shared.get_submodule(path).weight.detach() for path in ("block.conv", "depthwise")}
    sizes = {row.name: row.bytes for row in rows}
    assert sizes["float32 weights"] == 4 * sum(weight.numel() for weight in layers.values())
    assert sizes["same values, context coding"] == sum(coded_bytes(weight) for weight in layers.values())
    # Distances of 8 bits in convolutions hardly need a filler here; 5 bits in the linear layer.
    least = sum(int(w.count_nonzero()) * (32 + (8 if w.dim() == 4 else 5)) for w in layers.values()) / 8
    assert least <= sizes["pruned, relative indices"] < 1.2 * least
    least = sum(int(w.count_nonzero()) * (3 + (8 if w.dim() == 4 else 5)) / 8 + 32 for w in layers.values())
    assert least <= sizes["shared values"] < 1.2 * least
    order = [row.bytes for row in rows]
    assert order[:3] == sorted(order[:3], reverse=True)
    assert rows[-1].name == "pruned, shrink_file"
    assert rows[-1].score is not None


def test_the_table_has_the_factors() -> None:
    model = tiny()
    task = task_for(model)
    pruned, _ = PruneWeights(sparsity=0.5).run(model, task)
    rows = stages(pruned, ShareWeights(bits=2).run(copy.deepcopy(pruned), task)[0], task)
    lines = table(rows).splitlines()
    assert len(lines) == 1 + len(rows)
    assert f"{rows[0].bytes / rows[2].bytes:.1f}x" in lines[3]
    assert as_dicts(rows)[0] == {"stage": "float32 weights", "bytes": rows[0].bytes}


@pytest.mark.parametrize("data", [True, False])
def test_the_model_is_left_as_it_was(data: bool) -> None:
    model = tiny()
    task = task_for(model)
    if not data:
        task.train = task.calibrate = None
    pruned, _ = PruneWeights(sparsity=0.5).run(model, task)
    shared, _ = ShareWeights(bits=2).run(copy.deepcopy(pruned), task)
    before = [{name: value.clone() for name, value in each.state_dict().items()} for each in (pruned, shared)]
    names = [row.name for row in stages(pruned, shared, task)]
    assert ("pruned, shrink_file" in names) == data
    for each, was in zip((pruned, shared), before, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in each.state_dict().items())
