"""Seconds to cut half of the channels of the reference networks (plan and apply), and what is left of them.

    python benchmarks/cut_half.py --out benchmarks/results/cut_half.json

The time of torch.export inside of `plan` is given beside it, because it is not ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch

from tersenet import models
from tersenet.deploy.machine import machine
from tersenet.graph.capture import export
from tersenet.graph.costs import totals
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.sources import example_of
from tersenet.task import Task

CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
NAMES = (*CIFAR, "resnet18", "resnet34", "resnet50", "mobilenet_v2")


def seconds(work: object, *args: object) -> float:
    started = time.perf_counter()
    work(*args)  # type: ignore[operator]
    return time.perf_counter() - started


def one(name: str, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = models.build(name).eval()
    example = example_of(models.REFERENCES[name].preparation)
    step = PruneChannels(sparsity=0.5, residual=True, refit=False)
    task = Task(example=example)

    def cut() -> None:
        fresh = copy.deepcopy(model)
        step.apply(fresh, step.plan(fresh, task))

    thin = step.apply(copy.deepcopy(model), step.plan(model, task))
    return {
        "seconds": statistics.median(seconds(cut) for _ in range(repeats)),
        "of_which_torch_export": statistics.median(seconds(export, model, example) for _ in range(repeats)),
        "macs_left": totals(thin, example).macs / totals(model, example).macs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log = {"machine": machine(), "threads": 1, "networks": {}}
    for name in NAMES:
        log["networks"][name] = one(name, arguments.repeats)
        print(name, log["networks"][name])
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
