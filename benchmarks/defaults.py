"""What the defaults are worth: steps with their defaults, and with the plainer setting written out, in one run.

    python benchmarks/defaults.py --data ../shared/data --out benchmarks/results/defaults.json

ResNet-20 and the MobileNetV2 of the zoo on CIFAR-10, EfficientNet-Lite0 (timm's) on photographs with ImageNet labels.
No step sees a label, and nothing is trained. All is judged on training images that no step has seen, never on a test
set, because the defaults were chosen by such figures; the two networks for CIFAR-10 have seen them in their training.
Seconds are of one core's work (process time), so that other work on the machine hardly counts.

It goes on where it stopped; `--page docs/defaults.md` writes the tables of the page from the log.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersenet import open_model, open_task
from tersenet.atomic import writing
from tersenet.data.batches import TensorBatches
from tersenet.deploy.machine import machine
from tersenet.errors import InputWarning
from tersenet.numerics.divergence import divergence
from tersenet.recipe import Recipe
from tersenet.task import Task

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- defaults -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Network:
    """Args:
    data: folder under `--data`.
    held_out: share of the training images that judges, of which at most `judges`.
    """

    title: str
    spec: str
    weights: str
    data: str
    held_out: float
    judges: int = 1000


NETWORKS = {
    "resnet20": Network(
        "ResNet-20", "resnet20", "{data}/weights/cifar10_resnet20.safetensors", "cifar10", held_out=0.1
    ),
    "mobilenet_v2": Network(
        "MobileNetV2 at half width", "mobilenet_v2_cifar_half",
        f"{ROOT}/zoo/cifar10-mobilenetv2-half-int8/float.safetensors", "cifar10", held_out=0.1,
    ),
    "efficientnet_lite0": Network(
        "EfficientNet-Lite0", "timm:tf_efficientnet_lite0",
        "{data}/weights/imagenet_efficientnet_lite0.safetensors", "imagenet1000", held_out=0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A step with its defaults, and with what they could be instead.

    Args:
        settings: what both have.
        instead: the settings in place of the defaults.
        fold: whether batch norms are folded first; that is no part of the seconds.
    """

    step: str
    settings: Mapping[str, Any]
    instead: Mapping[str, Any]
    fold: bool = False

    @property
    def name(self) -> str:
        return f"{self.step}: {in_yaml(self.settings)}"


CASES = (
    Case("prune_weights", {"sparsity": 0.5}, {"refit": False}),
    Case("prune_weights", {"sparsity": 0.8}, {"refit": False}),
    Case("prune_weights", {"pattern": "2:4"}, {"refit": False}),
    Case("prune_weights", {"sparsity": 0.5, "pattern": "16x1"}, {"refit": False}),
    Case("quantize", {"weights": "int4"}, {"rounding": "nearest"}, fold=True),
    Case("quantize", {"weights": "int4"}, {"correct_bias": False}, fold=True),
    Case("quantize", {"weights": "int4", "activations": None}, {"rounding": "nearest"}, fold=True),
    Case("quantize", {"weights": "kmeans4", "activations": None}, {"rounding": "nearest"}, fold=True),
    Case("quantize", {}, {"rounding": "repaired"}, fold=True),
    Case("quantize", {}, {"correct_bias": True}, fold=True),
    Case("quantize", {}, {"equalise": True}, fold=True),
    Case("quantize", {}, {"ranges": "minmax"}, fold=True),
    Case("prune_channels", {"sparsity": 0.3}, {"refit": False}),
    Case("prune_channels", {"sparsity": 0.3}, {"importance": "reconstruction"}),
    Case("drop_blocks", {"count": 1}, {"refit": False}),
    Case("prune_activations", {}, {"refit": False}),
)


def in_yaml(settings: Mapping[str, Any]) -> str:
    """
    >>> in_yaml({"weights": "int4", "activations": None, "refit": False})
    '{weights: int4, activations: null, refit: false}'
    """
    words = {"None": "null", "True": "true", "False": "false"}
    return "{" + ", ".join(f"{key}: {words.get(str(value), value)}" for key, value in settings.items()) + "}"


def opened(network: Network, data: Path) -> tuple[nn.Module, Task, TensorBatches]:
    """(the float network, its task without labels, images that no step sees)."""
    model, preparation = open_model(network.spec, network.weights.format(data=data), 0)
    task = open_task(model, preparation, f"parquet:{data}/{network.data}", quiet=True)
    train = task.train
    assert isinstance(train, TensorBatches)
    plain = TensorBatches(train.images, train.labels, 50, train.preparation)
    judges, rest = plain.split(network.held_out, seed=0)
    judges, calibrate = judges.subset(network.judges, seed=0), rest.subset(1024, seed=0)
    return model.eval(), dataclasses.replace(task, train=None, calibrate=calibrate, test=None), judges


class Judge:
    """Scores a network beside the float one on images that no step has seen."""

    def __init__(self, model: nn.Module, judges: TensorBatches) -> None:
        self.judges = judges
        self.labels = torch.cat([y for _, y in judges])
        self.wanted = self._outputs(model)

    def row(self, model: nn.Module) -> dict[str, Any]:
        outputs = self._outputs(model)
        right = outputs.argmax(1) == self.labels
        return {"score": float(right.double().mean()), "divergence": divergence(self.wanted, outputs)}

    def _outputs(self, model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model.eval()(x) for x, _ in self.judges])


def measured(case: Case, settings: Mapping[str, Any], model: nn.Module, task: Task, judge: Judge) -> dict[str, Any]:
    """The score with these settings, and the seconds of work that the step took."""
    start = copy.deepcopy(model)
    if case.fold:
        start, _ = chain_of("fold_batch_norm", {}).run(start, task)
    before = time.process_time()
    made, _ = chain_of(case.step, {**case.settings, **settings}).run(start, task)
    seconds = time.process_time() - before
    return {"settings": dict(settings), **judge.row(made), "seconds": round(seconds, 2)}


def chain_of(step: str, settings: Mapping[str, Any]) -> Any:
    return Recipe.parse(json.dumps({"schema": 1, "steps": [{step: dict(settings)}]})).chain()


def measure(names: Sequence[str], data: Path, log: dict[str, Any], keep: Callable[[], None]) -> None:
    """Adds what the log has not yet."""
    for name in names:
        done = log["networks"].setdefault(name, {"title": NETWORKS[name].title, "cases": {}})
        lacking = [case for case in CASES if key_of(case) not in done["cases"]]
        if not lacking:
            continue
        model, task, judges = opened(NETWORKS[name], data)
        judge = Judge(model, judges)
        done |= {"float": judge.row(model)["score"], "images": judges.samples}
        plain: dict[str, dict[str, Any]] = {}  # one default, beside which several others stand
        for case in lacking:
            try:
                if case.name not in plain:
                    plain[case.name] = measured(case, {}, model, task, judge)
                row = {"default": plain[case.name], "instead": measured(case, case.instead, model, task, judge)}
            except ValueError as error:  # such as a network without blocks that can be dropped
                row = {"refused": str(error)}
            done["cases"][key_of(case)] = row
            keep()
            print(name, key_of(case), json.dumps(row), flush=True)


def key_of(case: Case) -> str:
    return f"{case.name} against {in_yaml(case.instead)}"


def page(log: Mapping[str, Any]) -> str:
    """A table for each network."""
    parts = []
    for network in log["networks"].values():
        parts.append(
            f"**{network['title']}**: {100 * network['float']:.1f} % in float, {network['images']:,} images.\n\n"
            "| step | default | instead | score, default | score, instead | divergence, default | divergence, instead "
            "| seconds, default | seconds, instead |\n|---|---|---|---:|---:|---:|---:|---:|---:|"
        )
        for case in CASES:
            row = network["cases"].get(key_of(case))
            if row is None or "refused" in row:
                continue
            first, second = row["default"], row["instead"]
            cells = [f"`{case.name}`", worded(case), f"`{in_yaml(case.instead)[1:-1]}`"]
            cells += [f"{100 * each['score']:.1f} %" for each in (first, second)]
            cells += [f"{each['divergence']:.2g}" for each in (first, second)]
            cells += [f"{each['seconds']:.1f}" for each in (first, second)]
            parts[-1] += "\n| " + " | ".join(cells) + " |"
    cpu = log["machine"]["cpu"]
    return "\n\n".join(parts) + f"\n\nOn {cpu}, seconds of one core.\n"


def worded(case: Case) -> str:
    """What the default is, of the settings that are tried instead."""
    known = dataclasses.asdict(chain_of(case.step, case.settings).steps[0])
    return f"`{in_yaml({key: known[key] for key in case.instead})[1:-1]}`"


def written(text: str, log: Mapping[str, Any]) -> str:
    """The page with its tables filled anew."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{page(log)}\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", InputWarning)  # of classes that the few photographs do not have
    log: dict[str, Any] = {"machine": machine(), "networks": {}}
    if arguments.out.exists():
        log = json.loads(arguments.out.read_text(encoding="utf-8"))

    def keep() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with writing(arguments.out) as temporary:
            temporary.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")

    if arguments.data is not None:
        measure(arguments.networks, arguments.data, log, keep)
    if arguments.page is not None:
        arguments.page.write_text(written(arguments.page.read_text(encoding="utf-8"), log), encoding="utf-8")


if __name__ == "__main__":
    main()
