"""Whether every runtime computes what PyTorch simulates: one int8 model as a file for each, scored on the same images.

The model is quantized once, after training, and kept as a .terse file in a folder, so that environments with different
runtimes (`litert` and `executorch` may not fit beside each other) score the very same numbers. Runtimes that are not
installed are left out, and what an earlier call found stays in the log:

    python benchmarks/parity.py resnet20 --weights cifar10_resnet20.safetensors --data parquet:cifar10 --keep parity

Writes benchmarks/results/parity_MODEL.json: per runtime the score of its file, that of the simulation, how many images
got another class, and the operators that the runtime left in float.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.left_in_float import READERS, left_in_float
from tersenet.deploy.merged_additions import as_openvino_adds
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.runtimes import open_file
from tersenet.deploy.tensorrt import broken_rules, export_tensorrt, symmetric
from tersenet.quantization.quantize import Quantize
from tersenet.sources import open_model, open_task
from tersenet.task import batch_input, batch_target

RESULTS = Path(__file__).parent / "results"


def _pt2(model: nn.Module, example: Tensor, path: Path) -> Path:
    return export_pt2(model, example, path)


def _terse(model: nn.Module, example: Tensor, path: Path) -> Path:
    return save_terse(model, example, path)


def _litert(model: nn.Module, example: Tensor, path: Path) -> Path:
    from tersenet.deploy.litert import export_litert

    return export_litert(model, example[:1], path)


def _executorch(model: nn.Module, example: Tensor, path: Path) -> Path:
    from tersenet.deploy.executorch import export_executorch

    return export_executorch(model, example[:1], path)


# What is scored: the writer, the file, the runtime that runs it, and the package that must be there.
ROWS: dict[str, tuple[Callable[..., Path], str, str, str]] = {
    "onnxruntime": (export_onnx, "model.onnx", "onnxruntime", "onnxruntime"),
    "openvino": (export_onnx, "model.onnx", "openvino", "openvino"),
    "tensorrt": (export_tensorrt, "model.tensorrt.onnx", "onnxruntime", "onnxruntime"),
    "pytorch": (_pt2, "model.pt2", "pytorch", "torch"),
    "pytorch-compiled": (_terse, "compiled.terse", "pytorch-compiled", "torch"),
    "litert": (_litert, "model.tflite", "litert", "litert_torch"),
    "executorch": (_executorch, "model.pte", "executorch", "executorch"),
}


# Runtimes that are held to a simulation of their own: TensorRT rounds to other grids, OpenVINO less often.
MEANT: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {"tensorrt": symmetric, "openvino": as_openvino_adds}


def classes(call: Callable[[np.ndarray], np.ndarray], batches: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.concatenate([call(x).argmax(axis=1) for x, _ in batches])


def simulated(model: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    def call(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    return call


def row(name: str, model: nn.Module, example: Tensor, folder: Path, data: Any, truth: np.ndarray) -> dict[str, Any]:
    write, file, runtime, _ = ROWS[name]
    path = write(model, example, folder / file)
    start = time.perf_counter()
    found = classes(open_file(path, runtime).run, data)
    seconds = time.perf_counter() - start
    kept = folder / (f"{name}.npy" if name in MEANT else "simulated.npy")
    if not kept.is_file():
        meant = MEANT[name](model, example) if name in MEANT else model
        np.save(kept, classes(simulated(meant.eval()), data))
    wanted = np.load(kept)
    entry: dict[str, Any] = {
        "score": float((found == truth).mean()),
        "simulated": float((wanted == truth).mean()),
        "other_class": int((found != wanted).sum()),
        "images": len(truth),
        "bytes": path.stat().st_size,
        "seconds": round(seconds, 1),
    }
    if name == "tensorrt":
        entry["broken_rules"] = broken_rules(path)
    elif runtime in READERS:
        entry["left_in_float"] = left_in_float(path, runtime)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="as for `tersenet compress`, such as resnet20")
    parser.add_argument("--weights", help="a .safetensors file, or .pt")
    parser.add_argument("--data", required=True, help="as for `tersenet compress`, such as parquet:DIR")
    parser.add_argument("--keep", type=Path, required=True, help="a folder for the model and the files")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--runtimes", default=",".join(ROWS), type=lambda text: text.split(","))
    parser.add_argument("--out", type=Path, help="the log; benchmarks/results/parity_MODEL.json by default")
    arguments = parser.parse_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    model, preparation = open_model(arguments.model, arguments.weights)
    task = open_task(model, preparation, arguments.data)
    terse = arguments.keep / "model.terse"
    if not terse.is_file():
        quantized, _ = Quantize().run(model, task)
        save_terse(quantized.eval(), task.example, terse, task.preparation)
    model = load_terse(terse)
    assert task.test is not None
    pairs = ((np.asarray(batch_input(b)), np.asarray(batch_target(b))) for b in task.test)
    data = list(itertools.islice(pairs, -(-arguments.images // 128)))
    truth = np.concatenate([y for _, y in data])
    out = arguments.out or RESULTS / f"parity_{arguments.model}.json"
    log = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"schema": 1, "model": arguments.model}
    for name in arguments.runtimes:
        if importlib.util.find_spec(ROWS[name][3]) is None:
            print(f"{name:18} left out: {ROWS[name][3]} is not installed")
            continue
        entry = row(name, model, task.example, arguments.keep, data, truth)
        log.setdefault("runtimes", {})[name] = entry
        print(
            f"{name:18} {100 * entry['score']:.2f} %, simulated {100 * entry['simulated']:.2f} %, "
            f"{entry['other_class']} of {entry['images']} images in another class, {entry['bytes']:,} bytes, "
            f"left in float: {entry.get('left_in_float', entry.get('broken_rules', '-'))}"
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
