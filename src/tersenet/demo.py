"""The main job on built-in data, from nothing: train a small net on digits, compress it, verify, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from tersenet import models
from tersenet.distill.soft_targets import SoftTargets
from tersenet.job import compress
from tersenet.models.weights import load_weights, save_weights
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.quantization.quantize import Quantize
from tersenet.recipe import Recipe
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.run import Run
from tersenet.sources import open_task
from tersenet.train import Train

TRAINING = Train(epochs=25, optimizer="adam", learning_rate=3e-3)
RECIPE = Recipe(
    (
        PruneChannels(sparsity=0.5, multiple_of=16),
        Train(epochs=15, optimizer="adam", learning_rate=2e-3, companions=(SoftTargets(),)),
        FoldBatchNorm(),
        Quantize(),
    )
)


def run_demo(out: Path, runtimes: Sequence[str], seed: int = 0, quiet: bool = False) -> Run:
    """Trains the digits net (once per folder), compresses it with RECIPE and reports. Resumes like any run."""
    torch.manual_seed(seed)
    model = models.build("digits")
    preparation = models.REFERENCES["digits"].preparation
    task = open_task(model, preparation, "digits", batch_size=64, seed=seed, quiet=quiet)
    say = Console(stderr=True, quiet=quiet, highlight=False).print
    weights = out.parent / f"{out.name}-original.safetensors"
    if weights.exists():
        say(f"the trained digits net is there already: {weights}")
        load_weights(model, weights)
    else:
        say("[bold]training[/bold] a small net on scikit-learn's digits")
        TRAINING.run(model, dataclasses.replace(task, folder=out.parent / f"{out.name}-original.state"))
        save_weights(model, weights)
    return compress(
        model.eval(),
        task,
        RECIPE,
        out=out,
        runtimes=runtimes,
        max_drop=1.0,
        names={"model": "digits", "data": "digits"},
        command=f"tersenet demo --out {out} --seed {seed}",
    )
