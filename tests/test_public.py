"""The promised names are exactly this list; each can be fetched and is documented."""

from __future__ import annotations

import pytest

import tersenet

PROMISED = {
    "ActivationPenalty", "Chain", "Companion", "DropBlocks", "FoldBatchNorm", "GroupLasso", "KeepEarly", "KeepGrids",
    "Metric", "NoEffect",
    "Plan", "Preparation", "PruneActivations", "PruneChannels", "PruneWeights", "Quantize", "QuantizeAware", "Ramp",
    "Recipe", "Recover",
    "Repeat", "Resize", "Rewind", "Run", "ScalePenalty", "Score", "Search", "Settle", "ShareWeights", "ShrinkFile",
    "SoftTargets", "Step", "Target",
    "Task", "TersenetError", "Train", "__version__", "compress", "costs", "dry_run", "export", "load",
    "measure",
    "open_model", "open_task", "prune", "quantize", "trace",
}  # fmt: skip


def test_the_list_is_the_promise() -> None:
    assert set(tersenet.__all__) == PROMISED
    assert set(dir(tersenet)) == PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED - {"__version__", "Plan"}))
def test_each_name_is_there_and_documented(name: str) -> None:
    assert getattr(tersenet, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tersenet.nonsense  # noqa: B018
