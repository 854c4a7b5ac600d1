"""Pre-activation networks in int8 against NNCF and ONNX Runtime's own quantizer: speed and outputs, in one run.

In these a batch norm and a ReLU stand in front of each convolution, so that no norm is folded and the residual sums are
read by norms (He et al., arXiv:1603.05027). A Wide ResNet for CIFAR-10 (arXiv:1605.07146), trained for a few epochs and
scored on the test set, and timm's resnetv2_50 at 160 pixels, whose weights are random and whose norms are estimated on
photographs: of that one the outputs are compared with the float network's. Run it on a machine that does nothing else:

    python benchmarks/preactivation.py make --keep files --cifar10 parquet:cifar10 --photographs parquet:imagenet1000
    python benchmarks/preactivation.py time --keep files
    python benchmarks/preactivation.py score --keep files --cifar10 parquet:cifar10 --photographs parquet:imagenet1000

Files, calibration images and how they are timed are those of int8_against_onnxruntime.py; NNCF takes part where it is
installed. Writes benchmarks/results/preactivation.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from int8_against_onnxruntime import calibration_images, contenders, make, timed
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.deploy.runtimes import open_file
from tersenet.deploy.verify import score_file
from tersenet.sources import open_model, open_task
from tersenet.task import Task
from tersenet.train.train import Train

RESULTS = Path(__file__).parent / "results"
PIXELS = 160
# Turns, calls of each, openings; the second network takes thirty times as long.
TIMES = {"wrn_16_1": (96, 50, 8), "resnetv2_50": (36, 5, 3)}
SAMPLES = {"wrn_16_1": 512, "resnetv2_50": 64}
RUNTIMES = ("onnxruntime", "openvino")


class Block(nn.Module):
    """Two convolutions, each behind a norm and a ReLU; a shortcut that changes the size starts behind those."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """(N, 3, 32, 32) -> (N, 10)."""

    def __init__(self, depth: int = 16, width: int = 1) -> None:
        super().__init__()
        sizes = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, sizes[0], 3, 1, 1, bias=False)
        blocks = []
        for group, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            for place in range((depth - 4) // 6):
                first = place == 0
                blocks.append(Block(inputs if first else outputs, outputs, 2 if first and group else 1))
        self.blocks = nn.Sequential(*blocks)
        self.bn, self.linear = nn.BatchNorm2d(sizes[-1]), nn.Linear(sizes[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.bn(self.blocks(self.conv1(x)))).mean((2, 3)))


def network(name: str, arguments: argparse.Namespace, folder: Path) -> tuple[nn.Module, Task]:
    """A network in evaluation mode, with the numbers that are kept in the folder or made and kept there."""
    kept = folder / "weights.pt"
    torch.manual_seed(0)
    if name == "wrn_16_1":
        model: nn.Module = WideResNet()
        preparation = open_model("resnet20")[1]
        task = open_task(model, preparation, arguments.cifar10)
    else:
        model, preparation = open_model("timm:resnetv2_50")
        preparation = dataclasses.replace(preparation, size=(PIXELS, PIXELS))
        task = open_task(model, preparation, arguments.photographs)
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    elif name == "wrn_16_1":
        model, _ = Train(epochs=arguments.epochs, learning_rate=0.2, warmup=0.2).run(model, task)
    else:
        estimate_norms(model, torch.from_numpy(calibration_images(task, SAMPLES[name])))
    torch.save(model.state_dict(), kept)
    return model.eval(), task


def estimate_norms(model: nn.Module, images: Tensor) -> None:
    """Random scales and shifts, so that no norm does nothing, and statistics of the images (N, C, H, W)."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # an average over the batches
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    model.train()
    with torch.no_grad():
        model(images)


def compared(files: dict[str, Path], runtime: str, model: nn.Module, task: Task, images: int) -> dict[str, Any]:
    """Each file's outputs beside the float network's on test images, and its score where the network is trained."""
    x = np.concatenate([np.asarray(batch[0]) for batch in task.test or ()][: 1 + images // 128])[:images]
    with torch.no_grad():
        wanted = np.concatenate([model(part).numpy() for part in torch.from_numpy(x).split(50)])
    rows: dict[str, Any] = {}
    for name, path in files.items():
        runner = open_file(path, runtime, threads=1)
        found = np.concatenate([runner.run(part) for part in np.array_split(x, -(-len(x) // 50))])
        noise = float(np.square(found - wanted).mean() / np.square(wanted).mean())
        rows[name] = {
            "signal_to_noise_db": round(-10 * float(np.log10(max(noise, 1e-12))), 2),
            "agreement": float((found.argmax(1) == wanted.argmax(1)).mean()),
            "images": len(x),
        }
        if isinstance(model, WideResNet):
            score = score_file(runner, task, task.test)
            rows[name] |= {"score": score.value, "samples": score.samples}
        print(f"{runtime:12} {name:18} {rows[name]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("make", "time", "score"))
    parser.add_argument("--keep", type=Path, required=True, help="a folder for the files")
    parser.add_argument("--cifar10", default="parquet:cifar10")
    parser.add_argument("--photographs", default="parquet:imagenet1000")
    parser.add_argument("--epochs", type=int, default=3, help="of training the Wide ResNet")
    parser.add_argument("--only", default=",".join(TIMES), type=lambda text: text.split(","))
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), type=lambda text: text.split(","))
    parser.add_argument("--images", type=int, default=500, help="of the test set, that outputs are compared on")
    parser.add_argument("--log", type=Path, default=RESULTS / "preactivation.json")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"onnxruntime|nncf|openvino|torch")
    torch.set_num_threads(1)
    log: dict[str, Any] = json.loads(given.log.read_text()) if given.log.exists() else {"schema": 1}
    for name in given.only:
        folder = given.keep / name
        folder.mkdir(parents=True, exist_ok=True)
        row = log.setdefault(name, {})
        model, task = network(name, given, folder)
        if given.stage == "make":
            row["seconds"] = make(model, task, SAMPLES[name], folder)
        for runtime, files in contenders(folder, given.runtimes).items():
            entry = row.setdefault(runtime, {"files": {}})
            if given.stage == "time":
                turns, calls, openings = TIMES[name]
                found = timed(files, runtime, task, turns, calls, openings)
                log["machine"] = found.pop("machine")
                found.pop("failed")
                for each, times in found.pop("files").items():
                    entry["files"].setdefault(each, {}).update(times)
                entry |= found | {"turns": turns, "calls": calls, "openings": openings}
            elif given.stage == "score":
                for each, values in compared(files, runtime, model, task, given.images).items():
                    entry["files"].setdefault(each, {}).update(values)
        given.log.write_text(json.dumps(log, indent=1) + "\n")
    print(f"written to {given.log}")


if __name__ == "__main__":
    main()
