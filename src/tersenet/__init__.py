"""tersenet makes trained neural networks smaller and faster, and proves it.

Names are fetched when they are first used, so that importing tersenet costs next to nothing and the command line
answers at once.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# The promised names, and the module that holds each.
_HOME = {
    "ActivationPenalty": "tersenet.pruning.activation_penalty",
    "Chain": "tersenet.step",
    "Companion": "tersenet.step",
    "DropBlocks": "tersenet.pruning.drop_blocks",
    "FoldBatchNorm": "tersenet.rewrite.fold_batch_norm",
    "GroupLasso": "tersenet.pruning.penalties",
    "KeepEarly": "tersenet.pruning.rewind",
    "KeepGrids": "tersenet.size.keep_grids",
    "Metric": "tersenet.metrics",
    "NoEffect": "tersenet.errors",
    "Plan": "tersenet.step",
    "Preparation": "tersenet.task",
    "PruneActivations": "tersenet.pruning.prune_activations",
    "PruneChannels": "tersenet.pruning.prune_channels",
    "PruneWeights": "tersenet.pruning.prune_weights",
    "Quantize": "tersenet.quantization.quantize",
    "Ramp": "tersenet.pruning.ramp",
    "Recipe": "tersenet.recipe",
    "QuantizeAware": "tersenet.quantization.quantize_aware",
    "Recover": "tersenet.train",
    "Repeat": "tersenet.repeat",
    "Resize": "tersenet.resize",
    "Rewind": "tersenet.pruning.rewind",
    "Run": "tersenet.run",
    "ScalePenalty": "tersenet.pruning.penalties",
    "Score": "tersenet.task",
    "Search": "tersenet.search.search",
    "Settle": "tersenet.rewrite.settle",
    "ShareWeights": "tersenet.size.share_weights",
    "ShrinkFile": "tersenet.size.shrink_file",
    "SoftTargets": "tersenet.distill.soft_targets",
    "Step": "tersenet.step",
    "Target": "tersenet.targets",
    "Task": "tersenet.task",
    "TersenetError": "tersenet.errors",
    "Train": "tersenet.train",
    "compress": "tersenet.job",
    "costs": "tersenet.graph.costs",
    "dry_run": "tersenet.dry_run",
    "export": "tersenet.exports",
    "load": "tersenet.deploy.artifact",
    "measure": "tersenet.deploy.measure",
    "open_model": "tersenet.sources",
    "open_task": "tersenet.sources",
    "prune": "tersenet.functions",
    "quantize": "tersenet.functions",
    "trace": "tersenet.graph.trace",
}
# Where the promised name differs from the name at home.
_SPELLED = {"load": "load_terse"}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tersenet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), _SPELLED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
