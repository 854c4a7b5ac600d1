"""Our cut against Torch-Pruning's, at the same multiply-adds: which file is faster in ONNX Runtime, float and int8.

Torch-Pruning removes half of the channels of every group by magnitude, as its documentation shows. The share of
multiply-adds that this leaves is what `PruneChannels` is asked for, once as it is ("tersenet") and once with widths
that are multiples of what the runtime likes ("tersenet, grain"). Where Torch-Pruning's model no longer runs, as that of
a CIFAR ResNet with padded shortcuts, both cut within the blocks only ("residual": false). All files of a model are
written by the same exporter and take turns in one process; int8 files come from our own quantizer on random data. Only
speed is compared, so the weights are those that the models are born with. Run it on a machine that does nothing else:

    pip install "tersenet[bench]"
    python benchmarks/against_torch_pruning.py

Writes benchmarks/results/against_torch_pruning.json. A model that a tool cannot cut, or a file that cannot be written,
is kept in it with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet import models
from tersenet.deploy.machine import machine
from tersenet.deploy.measure import Contender, measure
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.runtimes import open_file
from tersenet.errors import TersenetError, require
from tersenet.graph.costs import totals
from tersenet.graph.coupling import coupling
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.quantization.quantize import Quantize
from tersenet.sources import example_of
from tersenet.task import Task

NAMES = ("resnet20", "resnet56", "resnet18", "resnet50", "mobilenet_v2", "vgg16_bn")
SPARSITY = 0.5
RIVAL = "torch-pruning"
OUT = Path(__file__).parent / "results" / "against_torch_pruning.json"


def theirs(model: nn.Module, example: torch.Tensor, residual: bool) -> nn.Module:
    """Torch-Pruning's magnitude cut of half of the channels; the last layer keeps its classes.

    Args:
        residual: also cut what passes through residual additions.
    """
    tp = require("torch_pruning", "bench", "compare with it")
    model = copy.deepcopy(model)
    ignored = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    if not residual:
        inner = {
            path
            for bundle in coupling(model, example).bundles
            if not bundle.residual
            for path, role in bundle.members
            if role == "out"
        }
        ignored += [each for path, each in model.named_modules() if isinstance(each, nn.Conv2d) and path not in inner]
    pruner = tp.pruner.MagnitudePruner(
        model, example, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=SPARSITY,
        ignored_layers=ignored, iterative_steps=1,
    )  # fmt: skip
    pruner.step()
    model.eval()(example)
    return model


def ours(model: nn.Module, task: Task, share: float, multiple_of: int, residual: bool) -> nn.Module:
    """The same share of multiply-adds by `PruneChannels`."""
    step = PruneChannels(macs=share, multiple_of=multiple_of, residual=residual, refit=False)
    return step.run(copy.deepcopy(model), task)[0].eval()


def task_of(name: str) -> Task:
    """Random images: they set int8 ranges, which do not matter for speed."""
    preparation = models.REFERENCES[name].preparation
    example = example_of(preparation)
    noise = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    return Task(example=example, calibrate=[(noise, torch.zeros(8))], preparation=preparation, quiet=True)


def variants(model: nn.Module, task: Task, grain: int) -> tuple[dict[str, nn.Module], dict[str, str], bool]:
    """name -> cut model, the original first; name -> why there is none; and whether residual channels were cut."""
    found: dict[str, nn.Module] = {"original": model}
    failed: dict[str, str] = {}

    def attempt(name: str, make: Callable[[], nn.Module]) -> None:
        try:
            found[name] = make()
        except Exception as error:  # noqa: BLE001 - another tool may raise anything; its reason is kept
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    residual = True
    attempt(RIVAL, lambda: theirs(model, task.example, True))
    if RIVAL not in found:
        residual = False
        failed[f"{RIVAL}, residual"] = failed.pop(RIVAL)
        attempt(RIVAL, lambda: theirs(model, task.example, False))
    if RIVAL in found:
        share = totals(found[RIVAL], task.example).macs / totals(model, task.example).macs
        attempt("tersenet", lambda: ours(model, task, share, 1, residual))
        attempt("tersenet, grain", lambda: ours(model, task, share, grain, residual))
    return found, failed, residual


def files(cut: dict[str, nn.Module], task: Task, folder: Path, failed: dict[str, str]) -> dict[str, Path]:
    """name -> ONNX file, in float and, where it can be made, in int8."""
    found = {}
    for name, model in cut.items():
        stem = name.replace(", ", "_")
        for kind in ("float", "int8"):
            try:
                ready = model if kind == "float" else Quantize().run(copy.deepcopy(model), task)[0].eval()
                path = export_onnx(ready, task.example, folder / f"{stem}_{kind}.onnx", task.preparation)
                found[f"{name} {kind}"] = path
            except TersenetError as error:
                failed[f"{name} {kind}"] = str(error)
    return found


def one(name: str, grain: int, turns: int, calls: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one model."""
    torch.manual_seed(0)
    model, task = models.build(name).eval(), task_of(name)
    cut, failed, residual = variants(model, task, grain)
    before = totals(model, task.example)
    log: dict[str, Any] = {
        "residual": residual,
        "macs": {key: totals(each, task.example).macs for key, each in cut.items()},
        "params": {key: totals(each, task.example).params for key, each in cut.items()},
        "files": {},
        "ours_over_theirs": {},
    }
    x = np.ascontiguousarray(task.example[:1].numpy())
    with tempfile.TemporaryDirectory() as folder:
        written = files(cut, task, Path(folder), failed)
        runners = {key: open_file(path, "onnxruntime", threads=1) for key, path in written.items()}
        timed = measure([Contender(key, each, x) for key, each in runners.items()], turns=turns, calls=calls)
        for key, path in written.items():
            ratio = timed.ratio(key, "original float")
            log["files"][key] = {
                "latency_ms": timed.latency(key), "bytes": path.stat().st_size,
                "of_original_float": [ratio.ratio, ratio.low, ratio.high],
            }  # fmt: skip
    for kind in ("float", "int8"):
        for mine in ("tersenet", "tersenet, grain"):
            pair = f"{mine} {kind}", f"{RIVAL} {kind}"
            if all(key in written for key in pair):
                ratio = timed.ratio(*pair)
                log["ours_over_theirs"][pair[0]] = {
                    "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "not_slower": timed.not_slower(*pair),
                }  # fmt: skip
                share = log["macs"][mine] / before.macs
                say(
                    f"{name:13} {pair[0]:22}"
                    f" {ratio.ratio:.3f} of {RIVAL}'s time ({ratio.low:.3f} to {ratio.high:.3f}), at "
                    f"{share:.3f} of the MACs against {log['macs'][RIVAL] / before.macs:.3f}"
                )
    for key, reason in failed.items():
        say(f"{name:13} {key}: {reason}")
    return {**log, "failed": failed, "verdict": timed.verdict}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(NAMES), help=f"names in tersenet.models; {', '.join(NAMES)}")
    parser.add_argument("--grain", type=int, default=8, help="multiple of channels that the runtime likes")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--calls", type=int, default=50, help="timed calls per turn")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    tp = require("torch_pruning", "bench", "compare with it")
    warnings.filterwarnings("ignore", module=r"onnxruntime|torch|torch_pruning")
    torch.set_num_threads(1)
    log: dict[str, Any] = {
        "schema": 1, "machine": machine(), "torch_pruning": getattr(tp, "__version__", "unknown"), "threads": 1,
        "batch": 1, "sparsity": SPARSITY, "grain": arguments.grain, "turns": arguments.turns, "models": {},
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        log["models"][name] = one(name, arguments.grain, arguments.turns, arguments.calls, print)
        arguments.out.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
