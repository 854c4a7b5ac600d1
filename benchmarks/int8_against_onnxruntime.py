"""Our int8 file against ONNX Runtime's own static quantizer and, where it is installed, NNCF: speed and score, one run.

All contenders start from the same float model and the same training images. The files of one runtime take turns, each
in a process of its own and opened anew several times; each is scored on the whole test set in the runtime that it is
for. For OpenVINO all are in its own format. NNCF quantizes twice: our float ONNX file for ONNX Runtime, and OpenVINO's
model of it for OpenVINO. Run it on a machine that does nothing else:

    python benchmarks/int8_against_onnxruntime.py resnet20 \\
        --weights cifar10_resnet20.safetensors --data parquet:cifar10
    python benchmarks/int8_against_onnxruntime.py resnet50 --data random:3x224x224 --samples 16 --calls 10

Writes benchmarks/results/int8_MODEL.json. ONNX Runtime's quantizer runs as its documentation asks: after
quant_pre_process, as QDQ, weights int8 per channel, activations uint8, min-max ranges (its default); NNCF by default.
`seconds` are those of calibrating and rounding alone, with the images in memory, the shorter of two rounds in one
process: what each tool loads and compiles at its first call is left out. The work can be split: with --keep the
files stay in a folder, and --stage make, time or score does one part of it and adds to the log.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.deploy.apart import Entry, measure_apart
from tersenet.deploy.left_in_float import left_in_float
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.openvino import export_openvino
from tersenet.deploy.runtimes import open_file
from tersenet.deploy.verify import score_file, verify
from tersenet.quantization.quantize import Quantize
from tersenet.sources import open_model, open_task
from tersenet.task import Task, batch_input

RESULTS = Path(__file__).parent / "results"


def calibration_images(task: Task, samples: int) -> np.ndarray:
    """(N, C, H, W): the images that all quantizers see."""
    batches = [np.asarray(batch_input(batch)) for batch in task.calibration(samples)]
    return np.concatenate(batches)[:samples].astype(np.float32)


def ours(model: nn.Module, task: Task, images: np.ndarray, path: Path) -> float:
    task = dataclasses.replace(task, calibrate=[(torch.from_numpy(part),) for part in np.array_split(images, 4)])
    twin, step = copy.deepcopy(model), Quantize(samples=len(images))
    start = time.perf_counter()
    quantized, _ = step.run(twin, task)
    seconds = time.perf_counter() - start
    export_onnx(quantized.eval(), task.example, path, task.preparation)
    if importlib.util.find_spec("openvino"):
        export_openvino(quantized.eval(), task.example, path.with_suffix(".xml"), task.preparation)
    return seconds


def onnxruntimes_own(float_file: Path, images: np.ndarray, path: Path) -> float:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"input": image[None]}

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(float_file), str(prepared))
    start = time.perf_counter()
    quantize_static(
        str(prepared), str(path), Images(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return time.perf_counter() - start


def nncfs(float_file: Path, images: np.ndarray, path: Path) -> float:
    """For OpenVINO where the path ends in .xml, for ONNX Runtime where it ends in .onnx."""
    import nncf
    import onnx
    import openvino as ov

    openvinos = path.suffix == ".xml"
    model = ov.Core().read_model(str(float_file)) if openvinos else onnx.load(float_file)
    feeds = [image[None] if openvinos else {"input": image[None]} for image in images]
    start = time.perf_counter()
    quantized = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(images))
    seconds = time.perf_counter() - start
    if openvinos:
        ov.save_model(quantized, path, compress_to_fp16=False)
    else:
        onnx.save(quantized, path)
    return seconds


def for_openvino(path: Path) -> None:
    """Writes an ONNX file in OpenVINO's own format beside it: read from there it is a few percent faster."""
    import openvino as ov

    ov.save_model(ov.Core().read_model(path), path.with_suffix(".xml"), compress_to_fp16=False)


def make(model: nn.Module, task: Task, samples: int, folder: Path) -> dict[str, float]:
    """Writes the files of `contenders`; the seconds that each quantizer took."""
    images = calibration_images(task, samples)
    float_file = export_onnx(model, task.example, folder / "float.onnx", task.preparation)

    def shorter(quantize: Callable[..., float], *arguments: Any) -> float:
        return min(quantize(*arguments) for _ in range(2))

    seconds = {"tersenet int8": shorter(ours, model, task, images, folder / "ours.onnx")}
    for runtime in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(runtime) and (left := left_in_float(folder / "ours.onnx", runtime)):
            print(f"left in float by {runtime}: {', '.join(left)}", file=sys.stderr)
    seconds["onnxruntime int8"] = shorter(onnxruntimes_own, float_file, images, folder / "onnxruntime.onnx")
    if importlib.util.find_spec("nncf"):
        seconds["nncf int8"] = shorter(nncfs, float_file, images, folder / "nncf.xml")
        seconds["nncf int8 (onnx)"] = shorter(nncfs, float_file, images, folder / "nncf.onnx")
    if importlib.util.find_spec("openvino"):
        for name in ("float", "onnxruntime"):
            for_openvino(folder / f"{name}.onnx")
    return seconds


def contenders(folder: Path, runtimes: Sequence[str]) -> dict[str, dict[str, Path]]:
    """{runtime: {name: file}}, the float file first."""
    files = {"float": "float", "tersenet int8": "ours", "onnxruntime int8": "onnxruntime", "nncf int8": "nncf"}
    endings = {"onnxruntime": ".onnx", "openvino": ".xml"}
    found = {
        runtime: {name: folder / (file + endings[runtime]) for name, file in files.items()}
        for runtime in runtimes
        if importlib.util.find_spec(runtime)
    }
    found = {runtime: {name: path for name, path in each.items() if path.exists()} for runtime, each in found.items()}
    if not all("tersenet int8" in each for each in found.values()):
        raise SystemExit(f"there are no files in {folder}; call it with --stage make first")
    return found


def timed(files: dict[str, Path], runtime: str, task: Task, turns: int, calls: int, openings: int) -> dict[str, Any]:
    """Times the files of one runtime against each other."""
    x = calibration_images(task, 1)
    entries, failed = [], {}
    for name, path in files.items():
        try:
            open_file(path, runtime, threads=1).run(x)
            entries.append(Entry(name, path, runtime))
        except Exception as error:  # noqa: BLE001  (a rival's file that its runtime does not run is a result too)
            failed[name] = str(error)[:300]
            print(f"{runtime:12} {name:18} does not run: {failed[name]}")
    found = measure_apart(
        entries, x=x, turns=turns, calls=calls, discard=max(2, calls // 5), openings=openings, energy=False,
        progress=True,
    )  # fmt: skip
    rows: dict[str, Any] = {}
    names = [entry.name for entry in entries]
    for name in names:
        ratio = found.ratio(name, "float")
        rows[name] = {
            "latency_ms": found.latency(name),
            "of_float": [ratio.ratio, ratio.low, ratio.high],
            "bytes": sum(
                path.stat().st_size for path in {files[name], files[name].with_suffix(".bin")} if path.exists()
            ),
        }
        print(
            f"{runtime:12} {name:18} {rows[name]['latency_ms']['median']:8.3f} ms  {ratio.ratio:.3f} of float "
            f"({ratio.low:.3f} to {ratio.high:.3f})"
        )
    verdicts = {}
    for rival in names[2:]:
        ratio = found.ratio("tersenet int8", rival)
        verdicts[rival] = {
            "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high,
            "not_slower": found.not_slower("tersenet int8", rival),
        }  # fmt: skip
        print(f"{runtime:12} ours / {rival}: {ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
    return {
        "files": rows,
        "failed": failed,
        "ours_over": verdicts,
        "verdict": found.verdict,
        "machine": dict(found.machine),
    }


def scored(files: dict[str, Path], runtime: str, model: nn.Module, task: Task) -> dict[str, dict[str, Any]]:
    """Scores the files of one runtime, and compares their outputs with those of the float model."""
    rows = {}
    for name, path in files.items():
        runner = open_file(path, runtime, threads=1)
        rows[name] = {"max_abs_error_from_float": verify(runner, model, task.calibration(256)).max_abs_error}
        if task.test is not None:
            score = score_file(runner, task, task.test)
            rows[name] |= {"score": score.value, "score_interval": [score.low, score.high], "samples": score.samples}
            print(f"{runtime:12} {name:18} {100 * score.value:.2f} %")
    return rows


def work(arguments: argparse.Namespace, folder: Path, log: dict[str, Any]) -> None:
    """Does the stages that were asked for and writes what they gave into the log."""
    model, preparation = open_model(arguments.model, arguments.weights)
    task = open_task(model, preparation, arguments.data)
    if "make" in arguments.stage:
        log["seconds"] = make(model, task, arguments.samples, folder)
        log["samples"] = arguments.samples
        for name, seconds in log["seconds"].items():
            print(f"{name:18} quantized in {seconds:.1f} s")
    for runtime, files in contenders(folder, arguments.runtimes).items():
        entry = log.setdefault(runtime, {"files": {}})
        if "time" in arguments.stage:
            found = timed(files, runtime, task, arguments.turns, arguments.calls, arguments.openings)
            log["machine"] = found.pop("machine")
            log |= {name: getattr(arguments, name) for name in ("turns", "calls", "openings")}
            for name, row in found.pop("files").items():
                entry["files"].setdefault(name, {}).update(row)
            entry.update(found)
        if "score" in arguments.stage:
            for name, row in scored(files, runtime, model, task).items():
                entry["files"].setdefault(name, {}).update(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="as for `tersenet compress`, such as resnet20")
    parser.add_argument("--weights", help="a .safetensors file, or .pt")
    parser.add_argument("--data", required=True, help="as for `tersenet compress`, such as parquet:DIR")
    parser.add_argument("--samples", type=int, default=512, help="calibration images")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--openings", type=int, default=6, help="of all files, in new processes; turns are shared out")
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--runtimes", default="onnxruntime,openvino", type=lambda text: text.split(","))
    parser.add_argument("--keep", type=Path, help="a folder for the files, which are removed otherwise")
    parser.add_argument("--stage", default="make,time,score", type=lambda text: text.split(","))
    parser.add_argument("--out", type=Path, help="the log; benchmarks/results/int8_MODEL.json by default")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"onnxruntime|nncf|openvino|torch")
    name = "".join(letter if letter.isalnum() else "_" for letter in Path(arguments.model).stem)
    out = arguments.out if arguments.out is not None else RESULTS / f"int8_{name}.json"
    log: dict[str, Any] = {"schema": 1, "model": arguments.model}
    if "make" not in arguments.stage and out.is_file():
        log = json.loads(out.read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        work(arguments, folder, log)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
