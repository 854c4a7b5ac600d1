"""Every importance of channels on ResNet-20, without training: scores after cuts, agreement with the true loss, cost.

    python benchmarks/importances.py --weights cifar10_resnet20.safetensors --data parquet:cifar10 \\
        --out benchmarks/results/importances.json --page docs/pruning.md --plot docs/images/importances.svg

For each importance and seed (which picks calibration and training images): the score on the test set with 30, 50 and
70 % of the inner channels of every block gone, with repair and without; Spearman's rank correlation of its scores with
the true change of the loss when a channel goes alone, on augmented training images that no importance saw, over all
channels and as the mean over layers; and the seconds that it takes on a fresh model whose coupling is known. Goes on
where it stopped; the table and the plot are made from what there is.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from importances_page import plot, put_in, table

from tersenet import open_model, open_task
from tersenet.atomic import writing
from tersenet.deploy.machine import machine
from tersenet.graph.coupling import Bundle
from tersenet.pruning.channel_scores import SCORES, ranked
from tersenet.pruning.known import known_coupling
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.subject import Subject, readers
from tersenet.task import Task, score_model


def main() -> None:
    arguments = asked()
    network, preparation = open_model("resnet20", arguments.weights, 0)
    task = open_task(network, preparation, arguments.data, quiet=True)
    held, tasks = divided(task, arguments)
    test = list(task.test or ()) if arguments.test is None else list(task.test or ())[: -(-arguments.test // 128)]
    settings = {"seeds": arguments.seeds, "shares": arguments.shares, "held_out": arguments.held_out}
    settings |= {"test_samples": sum(len(batch[0]) for batch in test)}
    found: dict[str, Any] = {"machine": machine(), "settings": settings, "true": {}, "scores": {}, "costs": {}}
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise SystemExit(f"{arguments.out} was made with {found['settings']}; move it away, or ask for the same")

    def keep() -> None:
        with writing(arguments.out) as path:
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if "original" not in found:
        found["original"] = score_model(network, task, test).value
    for name, bundle in places(network, task):
        if name not in found["true"]:
            found["true"][name] = true_changes(network, task, bundle, held)
            keep()
    for importance in arguments.importances:
        for seed in range(arguments.seeds):
            agreement(found, importance, seed, network, tasks[seed])
            keep()
            for share in arguments.shares:
                plan: dict[str, Any] = {}
                for repair in (False, True):
                    key = f"{importance} {share} {'repaired' if repair else 'bare'} {seed}"
                    if key in found["scores"]:
                        continue
                    step = PruneChannels(importance=importance, sparsity=share, scope="layer")
                    plan = plan or step.plan(network, tasks[seed])
                    found["scores"][key] = scored(
                        found, plan, repair, network, dataclasses.replace(tasks[seed], test=test)
                    )
                    keep()
                    print(key, found["scores"][key]["score"], flush=True)
    text, picture = table(found), plot(found)
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        arguments.plot.write_text(picture, encoding="utf-8")
    if arguments.page:
        arguments.page.write_text(put_in(arguments.page.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(text)


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="a Markdown file with a block <!-- importances -->")
    parser.add_argument("--plot", type=Path, help="an SVG file")
    parser.add_argument("--importances", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=1024, help="training images for the true change of the loss")
    parser.add_argument("--test", type=int, help="only so many test images, to try the command out")
    return parser.parse_args()


def divided(task: Task, arguments: argparse.Namespace) -> tuple[list[Any], list[Task]]:
    """Held-out training images, augmented, and one task per seed that does not contain them."""
    data: Any = task.train
    seen, held = data.split(1 - arguments.held_out / data.samples, 12345)
    tasks = [
        dataclasses.replace(
            task,
            train=seen.like(seed=seed),
            calibrate=seen.like(augment=None, shuffle=False).subset(1024, seed),
            seed=seed,
        )
        for seed in range(arguments.seeds)
    ]
    return list(held.like(shuffle=False, batch_size=256)), tasks


def places(network: Any, task: Task) -> list[tuple[str, Bundle]]:
    """Every bundle of channels by the first layer that makes it, those of the residual stream included."""
    known = known_coupling(network, task.example)
    return [(next(path for path, role in bundle.members if role == "out"), bundle) for bundle in known.bundles]


def true_changes(network: Any, task: Task, bundle: Bundle, held: list[Any]) -> list[float]:
    """The loss on held-out images without each channel, minus the loss with all of them."""
    known, result, whole = known_coupling(network, task.example), [], loss_of(network, task, held)
    for own in bundle.classes:
        weights = {path: network.get_submodule(path).weight for path in readers(bundle)}
        old = {path: weight.detach().clone() for path, weight in weights.items()}
        with torch.no_grad():
            for path, weight in weights.items():
                weight[:, torch.from_numpy(known.slots[path, "in"] == own)] = 0.0
            result.append(loss_of(network, task, held) - whole)
            for path, weight in weights.items():
                weight.copy_(old[path])
    return result


def loss_of(network: Any, task: Task, held: list[Any]) -> float:
    network.eval()
    with torch.no_grad():
        sums = [float(task.loss(task.forward(network, batch), batch)) * len(batch[0]) for batch in held]
    return sum(sums) / sum(len(batch[0]) for batch in held)


def agreement(found: dict[str, Any], importance: str, seed: int, network: Any, task: Task) -> None:
    """Rank correlation of the scores with the true changes, and what they cost in seconds."""
    key = f"{importance} {seed}"
    if key in found["costs"]:
        return
    fresh = copy.deepcopy(network)
    known = known_coupling(fresh, task.example)
    started = time.perf_counter()
    scores = [scores for _, scores in ranked(Subject(fresh, known, known.bundles, task), importance)]
    seconds = time.perf_counter() - started
    true = [np.array(found["true"][name]) for name, _ in places(network, task)]
    within = [spearman(a, b) for a, b in zip(scores, true, strict=True)]
    overall = spearman(np.concatenate(scores), np.concatenate(true))
    found["costs"][key] = {"seconds": seconds, "overall": overall, "within": float(np.mean(within))}
    print(key, found["costs"][key], flush=True)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; 0 where one side is constant."""
    ranks: list[np.ndarray] = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def scored(found: dict[str, Any], plan: dict[str, Any], repair: bool, network: Any, task: Task) -> dict[str, Any]:
    """The score on the test set once a plan was carried out; what two importances agree on is measured once."""
    mark = f"{zlib.crc32(json.dumps(plan['keep'], sort_keys=True).encode()):08x}"
    for key, row in found["scores"].items():
        same_repair = (not repair and " bare " in key) or (repair and key.endswith(f"repaired {task.seed}"))
        if row["plan"] == mark and same_repair:
            return row
    made, _ = PruneChannels(keep=plan["keep"], refit=repair).run(copy.deepcopy(network), task)
    assert task.test is not None
    score = score_model(made, task, task.test)
    return {"plan": mark, "score": score.value, "low": score.low, "high": score.high}


if __name__ == "__main__":
    main()
