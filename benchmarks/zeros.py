"""Zeros in the weights of ResNet-56 against its score on the whole CIFAR-10 test set: single weights and 16x1 blocks.

    python benchmarks/zeros.py --weights cifar10_resnet56.safetensors --data parquet:cifar10 \\
        --out benchmarks/results/zeros.json [--epochs 10] [--again 10] [--shares 0.8 0.9] [--patterns weight 16x1]

Per pattern and share of zeros: the score right after masking by magnitude, the score after the repair without training
(512 unlabelled images), and with --epochs the score of a training with the original as teacher in which the masks
tighten and weights grow back (prune_weights: {sparsity: 0}, ramp); with --again a row more, after a second training
with the masks as they then are. The first and the last layer, 0.3 % of the weights, stay whole. A row is written as
soon as it is there, and what is there is not run again; training once cut goes on, and `seconds` are then the rest's.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from torch import nn

from tersenet import PruneWeights, Ramp, SoftTargets, Task, Train, open_model, open_task
from tersenet.atomic import writing
from tersenet.bricks.mask import masks
from tersenet.bricks.settle import unmask
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.machine import machine
from tersenet.step import Step
from tersenet.task import score_model

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SKIP = ("conv1", "linear")


def row(model: nn.Module, task: Task, started: float) -> dict[str, Any]:
    """What a masked model scores, and how many of all its weights in masked layers are zero."""
    seconds = time.perf_counter() - started
    found = list(masks(model).values())
    zeros = sum(float((~each.mask).sum()) for each in found) / sum(each.mask.numel() for each in found)
    assert task.test is not None
    score = score_model(model, task, task.test)
    return {
        "zeros": zeros, "score": score.value, "score_interval": [score.low, score.high], "samples": score.samples,
        "seconds": seconds,
    }  # fmt: skip


def trained(pattern: str, share: float, epochs: int) -> tuple[Step, ...]:
    """The recipe of a training during which the masks tighten."""
    ramp = Ramp(sparsity=share, end=0.6, regrow=True, scope="global")
    companions = (ramp, SoftTargets())
    train = Train(epochs=epochs, learning_rate=0.05, warmup=0.02, precision="auto", companions=companions)
    return PruneWeights(sparsity=0.0, pattern=pattern, skip=SKIP), train


def trained_again(epochs: int) -> Step:
    """The second training: its rate starts anew, the masks stay."""
    return Train(epochs=epochs, learning_rate=0.05, warmup=0.02, precision="auto", companions=(SoftTargets(),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--patterns", nargs="+", default=["weight", "16x1"])
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--again", type=int, default=0, help="epochs of a second training, after --epochs")
    parser.add_argument("--folder", type=Path, default=Path("runs/zeros"), help="of unfinished trainings, and files")
    arguments = parser.parse_args()
    network, preparation = open_model("resnet56", arguments.weights, 0)
    task = open_task(network, preparation, arguments.data, quiet=arguments.epochs == 0)
    log: dict[str, Any] = {"rows": {}}
    if arguments.out.exists():
        log = json.loads(arguments.out.read_text())
    log["machine"] = machine()

    def put(name: str, found: dict[str, Any]) -> None:
        log["rows"][name] = found
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with writing(arguments.out) as temporary:
            temporary.write_text(json.dumps(log, indent=1) + "\n")
        print(name, json.dumps(found), flush=True)

    for pattern in arguments.patterns:
        for share in arguments.shares:
            chains: dict[str, tuple[Step, ...]] = {
                f"{kind} {pattern} {share}": (PruneWeights(sparsity=share, pattern=pattern, refit=refit, skip=SKIP),)
                for kind, refit in (("masked", False), ("repaired", True))
            }
            if arguments.epochs:
                chains[f"trained {arguments.epochs} {pattern} {share}"] = trained(pattern, share, arguments.epochs)
            if arguments.epochs and arguments.again:
                first = trained(pattern, share, arguments.epochs)
                chains[f"trained {arguments.epochs}+{arguments.again} {pattern} {share}"] = (
                    *first, trained_again(arguments.again),
                )  # fmt: skip
            for name, steps in chains.items():
                if name in log["rows"]:
                    continue
                # A second training starts from the first, whose folder it shares.
                folder = arguments.folder / f"trained-{arguments.epochs}-{pattern}-{share}"
                own = dataclasses.replace(task, original=copy.deepcopy(network), folder=folder)
                model, started = copy.deepcopy(network), time.perf_counter()
                for step in steps:
                    model, _ = step.run(model, own)
                found = row(model, task, started)
                if len(steps) > 1:
                    folder.mkdir(parents=True, exist_ok=True)
                    path = folder / f"{name.replace(' ', '-')}.terse"
                    save_terse(unmask(copy.deepcopy(model)), task.example, path, preparation)
                put(name, found)


if __name__ == "__main__":
    main()
