"""Sixty of timm's networks, each compressed in three ways, and every file held to its model in two runtimes.

The list was written before the first run, by family (a module of timm) and size, not by result: the smallest network of
each of the 32 smallest families that docs/coverage.md does not know, and the smallest one that it knows of 28 families.

Each network has random weights and its own input size, data is `random:CxHxW`, and three jobs are done as a user would:
`compress` with examples/int8.yaml, `compress` with half of the channels pruned, and a lossless `pack`. Timing is cut
short, for nothing here is about time. What is compared is computed here, not by the checks inside of tersenet: the
outputs of every .onnx file in ONNX Runtime and OpenVINO by their own interfaces, and those of the .terse file.

A job is "right", "refused" in one sentence, "wrong" (an output disagrees, and nothing said so) or a "crash" (a
traceback). Every network is run in a process of its own with a time limit.

    python benchmarks/timm_networks.py                    what is missing in benchmarks/results/timm_networks.json
    python benchmarks/timm_networks.py --only 'rexnet*'   these again
    python benchmarks/timm_networks.py --summary          only counts

Needs timm, torchvision, onnxruntime and openvino.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage import settle as with_random_numbers
from torch import nn

import tersenet
import tersenet.ship
from tersenet.bricks.settle import settle
from tersenet.deploy.apart import measure_apart
from tersenet.deploy.machine import machine
from tersenet.deploy.merged_additions import as_openvino_adds
from tersenet.errors import TersenetError
from tersenet.files import pack
from tersenet.recipe import Recipe
from tersenet.run import Run
from tersenet.sources import open_model, open_task

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "timm_networks.json"
NEW = [
    "starnet_s050", "repghostnet_050", "efficientvit_m0", "cspnext_tiny", "iformer_t", "efficientvit_b0",
    "swiftformer_xs", "fasternet_t0", "lcnetv2_small", "inception_next_atto", "rexnet_100", "pit_ti_224",
    "hardcorenas_b", "coat_tiny", "convit_tiny", "hgnetv2_b0", "shvit_s1", "vit_tiny_r_s16_p8_224", "cpubone_nano",
    "efficientvim_m1", "crossvit_tiny_240", "mambaout_femto", "halonet_h1", "dpn48b", "csatv2", "resnetv2_18",
    "legacy_seresnet18", "gcvit_xxtiny", "lowformer_b0", "nest_tiny", "vit_srelpos_small_patch16_224",
    "vitamin_small_224",
]  # fmt: skip
KNOWN = [
    "mobilenetv3_large_100", "efficientnet_b0", "mobilevit_xxs", "edgenext_xx_small", "ghostnet_050", "regnetx_002",
    "xcit_nano_12_p16_224", "ese_vovnet19b_slim", "efficientformerv2_s0", "convnext_atto", "pvt_v2_b0", "fastvit_t8",
    "repvit_m0_9", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "gmlp_ti16_224", "levit_128s",
    "nf_regnet_b0", "repvgg_a0", "visformer_tiny", "resnest14d", "seresnet18", "skresnet18", "poolformer_s12",
    "cait_xxs24_224", "tiny_vit_5m_224", "hrnet_w18_small", "dla34",
]  # fmt: skip
JOBS = ("int8", "half", "pack")
HALF = {"schema": 1, "steps": [{"prune_channels": {"sparsity": 0.5, "residual": True}}, {"fold_batch_norm": {}}]}
FLOAT_TOLERANCE = 2e-3  # of the largest output: float32 in another order, through up to 200 layers
# In rms, as shares of what quantization itself changes. A rounding that ties flips by a step, and many layers of random
# numbers amplify that: the simulation itself moves by 0.3 (efficientvit_m0) or 0.5 (pit_ti_224) when its input moves
# by a millionth. So a file may differ from its simulation by half, or by twice what the simulation differs from itself;
# and it may not be further from the original than a quarter more than the simulation is.
INT8_SHARE, OWN_FACTOR, FURTHER = 0.5, 2.0, 1.25


class Wrong(Exception):
    """A file computes something else than its model, and nothing said so."""


def one(name: str, jobs: list[str]) -> dict[str, Any]:
    """{job: {"verdict", "said", "seconds", figures}} of one network."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tersenet.ship.measure_apart = functools.partial(measure_apart, calls=5, discard=0)  # type: ignore[attr-defined]
    found = {}
    for job in jobs:
        started = time.perf_counter()
        try:
            opened = functools.partial(_opened, name)
            made = _pack(name) if job == "pack" else {"int8": int8, "half": half}[job](opened)
            row = {"verdict": "right", **made}
        except TersenetError as error:
            row = {"verdict": "refused", "said": str(error)}
        except Wrong as error:
            row = {"verdict": "wrong", "said": str(error)}
        except Exception as error:  # noqa: BLE001 - what users would see as a traceback
            row = {"verdict": "crash", "said": f"{type(error).__name__}: {error}"[:400], "at": _place(error)}
        found[job] = {**row, "seconds": round(time.perf_counter() - started, 1)}
    return found


# Gives a model, its task and three inputs (3, C, H, W).
Opened = Callable[[], tuple[nn.Module, tersenet.Task, torch.Tensor]]


def _opened(name: str) -> tuple[nn.Module, tersenet.Task, torch.Tensor]:
    model, preparation = open_model(f"timm:{name}")
    torch.manual_seed(0)
    with_random_numbers(model)
    size = "x".join(map(str, (preparation.channels, *preparation.size)))
    task = open_task(model, preparation, f"random:{size}", quiet=True)
    return (
        model,
        task,
        torch.randn(3, preparation.channels, *preparation.size, generator=torch.Generator().manual_seed(7)),
    )


def _compressed(opened: Opened, recipe: Any, folder: Path) -> tuple[Run, nn.Module, tersenet.Task, torch.Tensor]:
    model, task, x = opened()
    run = tersenet.compress(model, task, recipe, out=folder, runtimes=("onnxruntime", "openvino"))
    return run, model, task, x


def int8(opened: Opened) -> dict[str, Any]:
    """Compresses with examples/int8.yaml; raises Wrong where a file computes something else."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.read(ROOT / "examples" / "int8.yaml")
        run, model, _, x = _compressed(opened, recipe, Path(folder))
        simulated = settle(run.model)
        reference, before = _outputs(simulated, x), _outputs(model, x)
        # OpenVINO lets convolutions take over the addition behind them, or not: a file is one or the other.
        merged = _outputs(as_openvino_adds(simulated, x[:2]), x)
        expected = {"onnxruntime": [reference], "openvino": [reference, merged]}
        changed = max(_rms(reference, before), 1e-6 * float(np.abs(before).max()))
        noise = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
        own = _rms(_outputs(simulated, x + noise), reference) / changed
        files = {run_in.__name__[1:]: run_in(Path(folder) / "model.onnx", x) for run_in in (_onnxruntime, _openvino)}
        shares = {where: min(_rms(file, one) for one in expected[where]) / changed for where, file in files.items()}
        further = {f"{where} to the original": _rms(file, before) / changed for where, file in files.items()}
        made = _held(shares, max(INT8_SHARE, OWN_FACTOR * own), "of what quantization changes", {})
        made["differs"] |= _held(further, FURTHER, "of what quantization changes", {})["differs"]
        made["differs"] |= _held({}, 0, "", _floats(run, folder, model, x))["differs"]
        return {**made, "own": float(f"{own:.3g}")}


def half(opened: Opened) -> dict[str, Any]:
    """Prunes half of the channels; raises Wrong where a file computes something else."""
    with tempfile.TemporaryDirectory() as folder:
        run, model, _, x = _compressed(opened, _recipe(HALF), Path(folder))
        pruned = run.model
        reference = _outputs(pruned, x)
        parameters = [sum(p.numel() for p in one.parameters()) for one in (model, pruned)]
        found = {
            "onnxruntime": _relative(_onnxruntime(Path(folder) / "model.onnx", x), reference),
            "openvino": _relative(_openvino(Path(folder) / "model.onnx", x), reference),
        }
        made = _held(found, FLOAT_TOLERANCE, "of the largest output", _floats(run, folder, model, x))
        return {**made, "times_fewer_parameters": round(parameters[0] / parameters[1], 2)}


def _pack(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.terse"
        pack(f"timm:{name}", path)
        model, preparation = open_model(f"timm:{name}")
        x = torch.randn(3, preparation.channels, *preparation.size, generator=torch.Generator().manual_seed(7))
        found = {"pytorch": _relative(_outputs(tersenet.load(path), x), _outputs(model, x))}
        return _held(found, FLOAT_TOLERANCE, "of the largest output", {})


def _floats(run: Run, folder: str, model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """How far the original's own .onnx file is from the original."""
    path = next((Path(folder) / "files").glob("00-original.onnx"))
    reference = _outputs(model, x)
    return {
        "original in onnxruntime": _relative(_onnxruntime(path, x), reference),
        "original in openvino": _relative(_openvino(path, x), reference),
    }


def _held(found: dict[str, float], allowed: float, unit: str, originals: dict[str, float]) -> dict[str, Any]:
    for where, value, limit, of in (
        *((where, value, allowed, unit) for where, value in found.items()),
        *((where, value, FLOAT_TOLERANCE, "of the largest output") for where, value in originals.items()),
    ):
        if not value <= limit:
            raise Wrong(f"{where} differs by {value:.3g} {of}; {limit:g} is allowed")
    return {"differs": {where: float(f"{value:.3g}") for where, value in {**found, **originals}.items()}}


def _recipe(data: dict[str, Any]) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(data), encoding="utf-8")  # JSON is YAML
        return Recipe.read(path)


def _outputs(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    for module in model.modules():
        module.training = False
    with torch.no_grad():
        return _first(model(x)).float().numpy()


def _first(outputs: Any) -> torch.Tensor:
    while not isinstance(outputs, torch.Tensor):
        outputs = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]
    return outputs


def _onnxruntime(path: Path, x: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _openvino(path: Path, x: torch.Tensor) -> np.ndarray:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    core = openvino.Core()
    return np.asarray(core.compile_model(core.read_model(str(path)), "CPU", settings)([x.numpy()])[0])


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-12))


def _place(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "tersenet" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _worker(work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], queue: Any) -> None:
    queue.put(work(*arguments))


def guarded(
    work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], jobs: list[str], limit: float
) -> dict[str, Any]:
    """A row of jobs, made in a process of its own; a crash of the process or a time limit is a row too."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_worker, args=(work, arguments, queue))
    process.start()
    try:
        return queue.get(timeout=limit)
    except Exception:  # noqa: BLE001 - queue.Empty
        why = f"no result in {limit:g} s" if process.is_alive() else f"the process ended with {process.exitcode}"
        return {job: {"verdict": "crash", "said": why} for job in jobs}
    finally:
        process.kill()
        process.join()


def summary(rows: dict[str, Any]) -> str:
    """Counts per job, and every network with a job that is not right."""
    lines = []
    for job in JOBS:
        counts = Counter(row[job]["verdict"] for row in rows.values() if job in row)
        lines.append(f"{job}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    right = sum(all(row.get(job, {}).get("verdict") == "right" for job in JOBS) for row in rows.values())
    lines.append(f"{right} of {len(rows)} networks right in all three (the list has {len(NEW) + len(KNOWN)})")
    for name, row in rows.items():
        lines += [f"  {name} {job}: {row[job]['verdict']}: {row[job].get('said', '')[:200]} {row[job].get('at', '')}"
                  for job in JOBS if row.get(job, {}).get("verdict", "right") != "right"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a pattern of names, to run again")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per network")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--failed", action="store_true", help="run again what was not right")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: dict[str, Any] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    for name in [] if arguments.summary else [*NEW, *KNOWN]:
        known = rows.get(name, {})
        again = arguments.only is not None and fnmatch.fnmatch(name, arguments.only)
        if arguments.only is not None and not again:
            continue
        jobs = [
            job
            for job in arguments.jobs.split(",")
            if again or job not in known or (arguments.failed and known[job]["verdict"] != "right")
        ]
        if not jobs:
            continue
        rows[name] = {**known, **guarded(one, (name, jobs), jobs, arguments.limit)}
        print(
            name, {job: (rows[name][job]["verdict"], rows[name][job].get("said", "")[:160]) for job in jobs}, flush=True
        )
        order = {known_name: rows[known_name] for known_name in [*NEW, *KNOWN] if known_name in rows}
        RESULTS.write_text(json.dumps({"machine": machine(), "rows": order}, indent=1) + "\n")
    print(summary(rows))


if __name__ == "__main__":
    main()
