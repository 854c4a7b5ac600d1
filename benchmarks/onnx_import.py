"""ONNX files of other people's making, imported: float equal to ONNX Runtime, then int8 and half of the channels.

The list was written before the first run: every network of tersenet.models, every second one of timm's on the list of
benchmarks/coverage.py and three of torchvision, all exported here by torch with random numbers; EfficientNet-Lite0 with
its weights; and PP-OCRv6 (detection, recognition, orientation), whose files lie in the wheel `rapidocr`.

Jobs of a network:
- dynamo, torchscript: the export of torch's current exporter with an open batch, and of its older one with a batch of
  1, imported. "right" means that all outputs for three samples are those of the file in ONNX Runtime to 1e-4 of the
  largest; "of_pytorch" is how far they are from the network that was exported. "not exported": torch makes no file.
- int8, half: the imported model (of the first job) compressed with examples/int8.yaml, and with half of its channels
  pruned; files are held to it in ONNX Runtime and OpenVINO as in benchmarks/timm_networks.py. Half is for classifiers.

    python benchmarks/onnx_import.py                                 dynamo and torchscript, what is missing
    python benchmarks/onnx_import.py --jobs int8,half                these of all networks
    python benchmarks/onnx_import.py --only 'timm:*' --jobs dynamo   again
    python benchmarks/onnx_import.py --ocr DIR                       with the .onnx files of rapidocr/models
    python benchmarks/onnx_import.py --summary                       only counts

Results go to benchmarks/results/onnx_import.json, a row per network. Needs timm, torchvision, onnxruntime and openvino.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage import TIMM
from coverage import settle as with_random_numbers
from timm_networks import Wrong, guarded, half, int8
from torch import nn
from torch.utils._pytree import tree_leaves

import tersenet
import tersenet.ship
from tersenet import models
from tersenet.deploy.apart import measure_apart
from tersenet.deploy.machine import machine
from tersenet.errors import TersenetError
from tersenet.onnx_import import open_onnx
from tersenet.sources import open_model, open_task

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "onnx_import.json"
LITE0 = "timm:tf_efficientnet_lite0"
WEIGHTS = ROOT.parent / "shared" / "data" / "weights" / "imagenet_efficientnet_lite0.safetensors"
OCR = {  # file -> (H, W) that it is opened with
    "PP-OCRv6_det_small": (640, 640),
    "PP-OCRv6_rec_small": (48, 320),
    "ch_ppocr_mobile_v2.0_cls_mobile": (48, 192),
}
NAMES = [
    *models.names(),
    *(f"timm:{name}" for name in TIMM[::2]),
    *(f"torchvision:{name}" for name in ("resnet18", "shufflenet_v2_x0_5", "squeezenet1_1")),
    LITE0,
    *(f"ocr:{name}" for name in OCR),
]
JOBS = ("dynamo", "torchscript", "int8", "half")
TOLERANCE = 1e-4  # of an output's largest entry


class NotExported(Exception):
    """torch's own exporter makes no file."""


def one(name: str, jobs: list[str], ocr: str | None) -> dict[str, Any]:
    """{job: {"verdict", "said", "seconds", figures}} of one network."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tersenet.ship.measure_apart = functools.partial(measure_apart, calls=5, discard=0)  # type: ignore[attr-defined]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            started = time.perf_counter()
            try:
                row = {"verdict": "right", **_job(job, name, Path(folder), ocr)}
            except TersenetError as error:
                row = {"verdict": "refused", "said": re.sub(rf"{tempfile.gettempdir()}/\w+/", "", str(error))}
            except Wrong as error:
                row = {"verdict": "wrong", "said": str(error)}
            except NotExported as error:
                row = {"verdict": "not exported", "said": str(error)}
            except Exception as error:  # noqa: BLE001 - what users would see as a traceback
                row = {"verdict": "crash", "said": f"{type(error).__name__}: {error}"[:400]}
            found[job] = {**row, "seconds": round(time.perf_counter() - started, 1)}
    return found


def _job(job: str, name: str, folder: Path, ocr: str | None) -> dict[str, Any]:
    if job in ("int8", "half"):
        return _compressed(job, name, folder, ocr)
    path, size, network, x = _file(name, job, folder, ocr)
    started = time.perf_counter()
    imported, _ = open_onnx(path, size)
    seconds = round(time.perf_counter() - started, 1)
    outputs = _outputs(imported, x)
    differs = _differs(outputs, _onnxruntime(path, x, 1 if job == "torchscript" else len(x)))
    if differs > TOLERANCE:
        raise Wrong(f"differs by {differs:.3g} of the largest output from ONNX Runtime; {TOLERANCE:g} is allowed")
    figures: dict[str, Any] = {"import_seconds": seconds, "differs": float(f"{differs:.2g}")}
    if network is not None:
        figures["of_pytorch"] = float(f"{_differs(outputs, _outputs(network, x)):.2g}")
    figures["parameters"] = sum(each.numel() for each in imported.parameters())
    return figures


def _compressed(job: str, name: str, folder: Path, ocr: str | None) -> dict[str, Any]:
    """The job on the file of the current exporter, else of the older one."""
    try:
        path, size, _, x = _file(name, "dynamo", folder, ocr)
    except NotExported:
        path, size, _, x = _file(name, "torchscript", folder, ocr)
    return {"int8": int8, "half": half}[job](lambda: _opened(path, size, x))


def _file(
    name: str, exporter: str, folder: Path, ocr: str | None
) -> tuple[Path, tuple[int, int] | None, nn.Module | None, torch.Tensor]:
    """(the file, the size to open it with, the network that it was exported from, three inputs).

    Raises:
        NotExported: in the exporter's words.
    """
    generator = torch.Generator().manual_seed(7)
    if name.startswith("ocr:"):
        size = OCR[name[4:]]
        return Path(ocr or "") / f"{name[4:]}.onnx", size, None, torch.randn(3, 3, *size, generator=generator)
    weights = WEIGHTS if name == LITE0 else None
    network, preparation = open_model(name, weights)
    network.eval()
    if weights is None:
        torch.manual_seed(0)
        with_random_numbers(network)
    x = torch.randn(3, preparation.channels, *preparation.size, generator=generator)
    path = folder / f"{exporter}.onnx"
    try:
        if not path.exists() and exporter == "dynamo":
            shapes = ({0: torch.export.Dim.DYNAMIC},)
            torch.onnx.export(network, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        elif not path.exists():
            torch.onnx.export(network, (x[:1],), path, dynamo=False)
    except Exception as error:  # exporters raise many kinds
        cause = error.__cause__ or error
        raise NotExported(f"{type(cause).__name__}: {cause}"[:300]) from error
    return path, None, network, x


def _opened(path: Path, size: tuple[int, int] | None, x: torch.Tensor) -> tuple[nn.Module, tersenet.Task, torch.Tensor]:
    model, preparation = open_onnx(path, size)
    assert preparation is not None
    data = "x".join(map(str, (preparation.channels, *preparation.size)))
    return model, open_task(model, preparation, f"random:{data}", quiet=True), x


def _outputs(model: nn.Module, x: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [each.numpy() for each in tree_leaves(model(x))]


def _onnxruntime(path: Path, x: torch.Tensor, batch: int) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: part.numpy()}) for part in x.split(batch)]
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def _differs(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in pairs)


def summary(rows: dict[str, Any]) -> str:
    """Counts per job, and every network with a job that is not right."""
    lines = []
    for job in JOBS:
        counts = Counter(row[job]["verdict"] for row in rows.values() if job in row)
        lines.append(f"{job}: " + (", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "none run"))
    lines.append(f"{len(rows)} of {len(NAMES)} networks were run")
    for name, row in rows.items():
        lines += [f"  {name} {job}: {row[job]['verdict']}: {row[job].get('said', '')[:300]}"
                  for job in JOBS if row.get(job, {}).get("verdict", "right") != "right"]  # fmt: skip
    return "\n".join(lines)


def _wanted(name: str, jobs: str) -> list[str]:
    """The jobs that a network has: a file of others has one form, and only classifiers are pruned here."""
    has = ("dynamo", "int8") if name.startswith("ocr:") else JOBS
    return [job for job in jobs.split(",") if job in has]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a pattern of names, to run again")
    parser.add_argument("--jobs", default="dynamo,torchscript", help=f"of {', '.join(JOBS)}")
    parser.add_argument("--ocr", help="the folder of PP-OCR's .onnx files")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per network")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--failed", action="store_true", help="run again what was not right")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: dict[str, Any] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    for name in [] if arguments.summary else NAMES:
        known = rows.get(name, {})
        again = arguments.only is not None and fnmatch.fnmatch(name, arguments.only)
        if (arguments.only is not None and not again) or (name.startswith("ocr:") and arguments.ocr is None):
            continue
        jobs = [
            job
            for job in _wanted(name, arguments.jobs)
            if again or job not in known or (arguments.failed and known[job]["verdict"] != "right")
        ]
        if not jobs:
            continue
        rows[name] = {**known, **guarded(one, (name, jobs, arguments.ocr), jobs, arguments.limit)}
        said = {job: (rows[name][job]["verdict"], rows[name][job].get("said", "")[:200]) for job in jobs}
        print(name, said, flush=True)
        order = {each: rows[each] for each in NAMES if each in rows}
        RESULTS.write_text(json.dumps({"machine": machine(), "rows": order}, indent=1) + "\n")
    print(summary(rows))


if __name__ == "__main__":
    main()
