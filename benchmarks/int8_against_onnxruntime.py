"""Our int8 file against ONNX Runtime's own static quantizer and, where it is installed, NNCF: speed and score, one run.

All contenders start from the same float model and 512 training images. The files of one runtime take turns in one
process; each is scored on the whole test set in the runtime that it is for. NNCF's model is OpenVINO's, so it is
measured and scored there only, beside our file. Run it on a machine that does nothing else:

    python benchmarks/int8_against_onnxruntime.py resnet20 \\
        --weights cifar10_resnet20.safetensors --data parquet:cifar10

Writes benchmarks/results/int8_MODEL.json. ONNX Runtime's quantizer runs as its documentation asks: after
quant_pre_process, as QDQ, weights int8 per channel, activations uint8, min-max ranges (its default).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tersenet.deploy.measure import Contender, measure
from tersenet.deploy.onnx import export_onnx, operators_left_in_float
from tersenet.deploy.runtimes import open_file
from tersenet.deploy.verify import score_file, verify
from tersenet.quantize.quantize import Quantize
from tersenet.sources import open_model, open_task
from tersenet.task import Task, batch_input

SAMPLES = 512
RESULTS = Path(__file__).parent / "results"


def calibration_images(task: Task) -> np.ndarray:
    """(512, C, H, W): the images that all quantizers see."""
    batches = [np.asarray(batch_input(batch)) for batch in task.calibration(SAMPLES)]
    return np.concatenate(batches)[:SAMPLES].astype(np.float32)


def ours(model: nn.Module, task: Task, path: Path) -> Path:
    quantized, _ = Quantize(samples=SAMPLES).run(model, task)
    return export_onnx(quantized.eval(), task.example, path, task.preparation)


def onnxruntimes_own(float_file: Path, images: np.ndarray, path: Path) -> Path:
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
    quantize_static(
        str(prepared), str(path), Images(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


def nncfs(float_file: Path, images: np.ndarray, path: Path) -> Path:
    import nncf
    import openvino as ov

    model = ov.Core().read_model(str(float_file))
    data = nncf.Dataset([image[None] for image in images])
    ov.save_model(nncf.quantize(model, data, subset_size=len(images)), path, compress_to_fp16=False)
    return path


def contenders(model: nn.Module, task: Task, folder: Path) -> dict[str, dict[str, Path]]:
    """{runtime: {name: file}}, the float file first."""
    images = calibration_images(task)
    float_file = export_onnx(model, task.example, folder / "float.onnx", task.preparation)
    mine = ours(model, task, folder / "ours.onnx")
    left = operators_left_in_float(mine)
    if left:
        print(f"left in float by ONNX Runtime: {', '.join(left)}", file=sys.stderr)
    theirs = onnxruntimes_own(float_file, images, folder / "onnxruntime.onnx")
    files = {"float": float_file, "tersenet int8": mine, "onnxruntime int8": theirs}
    found = {"onnxruntime": dict(files)}
    if importlib.util.find_spec("openvino"):
        found["openvino"] = dict(files)
        if importlib.util.find_spec("nncf"):
            found["openvino"]["nncf int8"] = nncfs(float_file, images, folder / "nncf.xml")
    return found


def compare(
    files: dict[str, Path], runtime: str, model: nn.Module, task: Task, turns: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Times the files of one runtime against each other, and scores each there."""
    x = calibration_images(task)[:1]
    runners = {name: open_file(path, runtime, threads=1) for name, path in files.items()}
    timed = measure([Contender(name, runner, x) for name, runner in runners.items()], turns=turns, progress=True)
    rows: dict[str, Any] = {}
    for name, runner in runners.items():
        ratio = timed.ratio(name, "float")
        agreement = verify(runner, model, task.calibration(256))
        rows[name] = {
            "latency_ms": timed.latency(name),
            "of_float": [ratio.ratio, ratio.low, ratio.high],
            "bytes": sum(
                path.stat().st_size for path in {files[name], files[name].with_suffix(".bin")} if path.exists()
            ),
            "max_abs_error_from_float": agreement.max_abs_error,
        }
        if task.test is not None:
            score = score_file(runner, task, task.test)
            rows[name] |= {"score": score.value, "score_interval": [score.low, score.high], "samples": score.samples}
        say(
            f"{runtime:12} {name:18} {rows[name]['latency_ms']['median']:8.3f} ms  {ratio.ratio:.3f} of float "
            f"({ratio.low:.3f} to {ratio.high:.3f})  {100 * rows[name].get('score', float('nan')):.2f} %"
        )
    verdicts = {}
    for rival in list(files)[2:]:
        ratio = timed.ratio("tersenet int8", rival)
        verdicts[rival] = {
            "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high,
            "not_slower": timed.not_slower("tersenet int8", rival),
        }  # fmt: skip
        say(f"{runtime:12} ours / {rival}: {ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
    say(f"{runtime:12} {timed.verdict}")
    return {"files": rows, "ours_over": verdicts, "verdict": timed.verdict, "machine": dict(timed.machine)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="as for `tersenet compress`, such as resnet20")
    parser.add_argument("--weights", help="a .safetensors file, or .pt")
    parser.add_argument("--data", required=True, help="as for `tersenet compress`, such as parquet:DIR")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path, help="the log; benchmarks/results/int8_MODEL.json by default")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"onnxruntime|nncf|openvino|torch")
    model, preparation = open_model(arguments.model, arguments.weights)
    task = open_task(model, preparation, arguments.data)
    log: dict[str, Any] = {"schema": 1, "model": arguments.model, "samples": SAMPLES, "turns": arguments.turns}
    with tempfile.TemporaryDirectory() as folder:
        for runtime, files in contenders(model, task, Path(folder)).items():
            found = compare(files, runtime, model, task, arguments.turns, print)
            log["machine"] = found.pop("machine")
            log[runtime] = found
    name = "".join(letter if letter.isalnum() else "_" for letter in Path(arguments.model).stem)
    out = arguments.out if arguments.out is not None else RESULTS / f"int8_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
