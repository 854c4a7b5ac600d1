"""A thousand random networks through capture, cut, fold, int8 and export, each held to what it must compute.

Every seed is a network of `random_parts`, which goes through the jobs of `JOBS`. What each result is compared with is
computed here: a cut network with the uncut one in which the removed channels are zero, files with the module that they
were made of, int8 files with their simulation (at every quantizer, and at the outputs) by the check that what ships
goes through, which leaves in float what a runtime computes wrong. A row is "right", "refused" in one sentence, "wrong"
or a "crash".

    python benchmarks/random_networks.py --count 1000       what is missing in benchmarks/results/random_networks.json
    python benchmarks/random_networks.py --seeds 7,81       these again

Needs onnxruntime and openvino.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
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
from masked_twin import Zeroed, difference, half, leaves
from random_parts import network
from torch import Tensor, nn

import tersenet
from tersenet.bricks.settle import settle
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.checked import checked
from tersenet.deploy.machine import machine
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.reference import Reference
from tersenet.deploy.runtimes import open_file
from tersenet.errors import TersenetError
from tersenet.graph.coupling import coupling
from tersenet.graph.recut import recut

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "random_networks.json"
RUNTIMES = ("onnxruntime", "openvino")
# Of the largest value of an output: float32 in another order, and runtimes' own exp, erf and tanh.
FLOAT = 1e-4
Network = tuple[nn.Module, tuple[Tensor, ...]]


class Wrong(Exception):
    """Something computes what it should not, and nothing said so."""


def of_seed(seed: int) -> Network:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    return network(lambda options: generator.choice(list(options)))


def cut(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> dict[str, Any]:
    """Half of the channels of every bundle go by chance; the masked twin says what must be left."""
    known = coupling(model, _example(inputs))
    removed = half(known)
    with torch.no_grad():
        expected = leaves(Zeroed(known, removed).run(*inputs))
        small = recut(copy.deepcopy(model), known.plan(model, removed)).eval()
        found = leaves(small(*inputs))
    _same(found, expected, "the cut network", FLOAT)
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    return {"times_fewer": round(before / after, 2), "left_alone": len(known.frozen)}


def fold(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> dict[str, Any]:
    """Batch norms folded: the same outputs."""
    folded, _ = _quietly(tersenet.FoldBatchNorm(), copy.deepcopy(model), _task(inputs))
    with torch.no_grad():
        _same(leaves(folded(*inputs)), leaves(model(*inputs)), "the folded network", FLOAT)
    return {}


def files(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> dict[str, Any]:
    """The float network as .terse, .pt2 and .onnx, at another batch than the example's."""
    return _as_files(model, inputs, folder, None)


def int8(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> dict[str, Any]:
    """The int8 network as .terse and .onnx, held to its simulation."""
    task = _task(inputs)
    folded, _ = _quietly(tersenet.FoldBatchNorm(), copy.deepcopy(model), task)
    quantized, plan = _quietly(tersenet.Quantize(samples=32), folded, task)
    settled = settle(quantized)
    found = _as_files(settled, inputs, folder, task)
    return {**found, "quantized": len(plan.get("layers", {}))}


JOBS: dict[str, Callable[[nn.Module, tuple[Tensor, ...], Path], dict[str, Any]]] = {
    "cut": cut, "fold": fold, "files": files, "int8": int8
}  # fmt: skip


def _as_files(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path, task: Any) -> dict[str, Any]:
    x = tuple(torch.cat([v, v.flip(0), 0.5 * v])[:5] for v in inputs)
    example = _example(inputs)
    with torch.no_grad():
        expected = leaves(model(*x))
    paths = [save_terse(model, example, folder / "m.terse")]
    if task is None:
        paths.append(export_pt2(model, example, folder / "m.pt2"))
    for path in paths:
        found = open_file(path).run_all(tuple(v.numpy() for v in x))
        _same([torch.from_numpy(np.asarray(v)) for v in found], expected, path.name, FLOAT)
    path = export_onnx(model, example, folder / "m.onnx")
    reference = None if task is None else Reference(model, example, task.calibrate, 0)
    figures: dict[str, Any] = {}
    for runtime in RUNTIMES:
        if reference is None:
            found = open_file(path, runtime).run_all(tuple(v.numpy() for v in x))
            _same([torch.from_numpy(np.asarray(v)) for v in found], expected, f"m.onnx in {runtime}", FLOAT)
        else:
            export_onnx(model, example, path)
            rewrite = functools.partial(_with_floats, model, example, path)
            agreement = checked(path, [runtime], reference, rewrite)[runtime]  # as what ships is checked and mended
            figures[runtime] = round(agreement.excess if agreement.steps is None else agreement.steps.share, 5)
            if agreement.in_float:
                figures[f"left in float for {runtime}"] = ", ".join(agreement.in_float)
    return figures


def _with_floats(model: nn.Module, example: Any, path: Path, floats: Any) -> None:
    export_onnx(model, example, path, floats=floats)


def _example(inputs: tuple[Tensor, ...]) -> Any:
    return inputs if len(inputs) > 1 else inputs[0]


def _task(inputs: tuple[Tensor, ...]) -> tersenet.Task:
    generator = torch.Generator().manual_seed(5)
    batches = [
        (_example(tuple(torch.randn(8, *x.shape[1:], generator=generator) for x in inputs)), torch.zeros(8).long())
        for _ in range(4)
    ]
    return tersenet.Task(example=_example(inputs), calibrate=batches, quiet=True)


def _quietly(step: tersenet.Step, model: nn.Module, task: tersenet.Task) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be no batch norm, and layers are left in float
        return step.run(model, task)


def _same(found: list[Tensor], expected: list[Tensor], what: str, limit: float) -> None:
    if [v.shape for v in found] != [v.shape for v in expected]:
        raise Wrong(f"{what} gives {[tuple(v.shape) for v in found]}, expected {[tuple(v.shape) for v in expected]}")
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        off = difference(a.double(), b.double())
        if not off <= limit:
            raise Wrong(f"{what} differs by {off:.3g} of the largest value of output {i}; {limit:g} is allowed")


def examine(made: Network, jobs: list[str]) -> dict[str, Any]:
    """{job: {"verdict", "said", figures}} of one network."""
    model, inputs = made
    rows = {}
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = {"verdict": "right", **JOBS[job](copy.deepcopy(model), inputs, Path(folder))}
            except TersenetError as error:
                row = {"verdict": "refused", "said": str(error)[:400]}
            except Wrong as error:
                row = {"verdict": "wrong", "said": str(error)[:400]}
            except Exception as error:  # noqa: BLE001 - what users would see as a traceback
                frames = traceback.extract_tb(error.__traceback__)
                own = [frame for frame in frames if "tersenet" in frame.filename][-1:]
                at = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in own)
                row = {"verdict": "crash", "said": f"{type(error).__name__}: {error}"[:400] + at}
        rows[job] = row
    return rows


def summary(rows: dict[str, Any]) -> str:
    lines = [f"{len(rows)} networks"]
    for job in JOBS:
        counts = Counter(row[job]["verdict"] for row in rows.values() if job in row)
        lines.append(f"{job}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return "\n".join(lines)


def as_text(rows: dict[str, Any]) -> str:
    """The log, a network a line."""
    lines = ",\n".join(f"{json.dumps(seed)}: {json.dumps(row)}" for seed, row in rows.items())
    return f'{{"machine": {json.dumps(machine())},\n"rows": {{\n{lines}\n}}}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seeds", default="")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else {}
    again = [int(seed) for seed in arguments.seeds.split(",") if seed]
    jobs = arguments.jobs.split(",")
    wanted = again or [s for s in range(arguments.start, arguments.count) if set(jobs) - set(rows.get(str(s), {}))]
    for done, seed in enumerate(wanted, start=1):
        started = time.perf_counter()
        rows[str(seed)] = {**rows.get(str(seed), {}), **examine(of_seed(seed), jobs)}
        bad = {job: row for job, row in rows[str(seed)].items() if row["verdict"] != "right"}
        print(f"{seed} ({done}/{len(wanted)}, {time.perf_counter() - started:.0f} s) {bad or 'right'}", flush=True)
        if done % 10 == 0 or done == len(wanted):
            arguments.out.parent.mkdir(exist_ok=True)
            rows = dict(sorted(rows.items(), key=lambda item: int(item[0])))
            arguments.out.write_text(as_text(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
