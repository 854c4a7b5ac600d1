"""Whether every planted fault is refused: each corruption of tests/planted_faults.py, float and int8, in each runtime.

    python benchmarks/planted_faults.py

Writes benchmarks/results/planted_faults.json: per fault and runtime whether the file was refused, its error as a
multiple of what is allowed at the outputs, and of an int8 file how many steps a quantizer is beyond half a step (where
that is why it was refused, the outputs alone would not have shown it). "right" is the file without a fault.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "deploy")]

from test_planted_faults import RUNTIMES, TASK, Net, X  # noqa: E402

from planted_faults import FAULTS, INT8_FAULTS, plant  # noqa: E402
from tersenet.bricks.settle import settle  # noqa: E402
from tersenet.deploy.onnx import export_onnx  # noqa: E402
from tersenet.deploy.reference import Reference  # noqa: E402
from tersenet.deploy.verify import compare_file  # noqa: E402
from tersenet.errors import TersenetError  # noqa: E402
from tersenet.quantization.quantize import Quantize  # noqa: E402


def judge(path: Path, runtime: str, reference: Reference) -> dict[str, Any]:
    try:
        found = compare_file(path, runtime, reference)
    except TersenetError as error:
        return {"refused": True, "why": str(error).replace(str(path), "the file")[:160]}
    beyond = None if found.steps is None else found.steps.beyond
    figures = {"times_allowed": found.excess, "steps_beyond": beyond}
    return {"refused": not found.agrees} | {
        key: round(value, 6) if math.isfinite(value) else str(value)
        for key, value in figures.items()
        if value is not None
    }


def main() -> None:
    int8, _ = Quantize().run(Net().eval(), TASK)
    models = {"float": Net().eval(), "int8": settle(int8)}
    log: dict[str, Any] = {"seconds": 0.0, "missed": [], "files": {}}
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for kind, model in models.items():
            reference = Reference(model, X[:2], [X])
            path = export_onnx(model, X[:2], Path(folder) / "model.onnx", pack=False)
            right = path.read_bytes()
            log["files"][kind] = {"right": {runtime: judge(path, runtime, reference) for runtime in RUNTIMES}}
            for name, fault in (FAULTS if kind == "float" else {**FAULTS, **INT8_FAULTS}).items():
                data = plant(right, fault)
                if data is None:
                    continue
                path.write_bytes(data)
                log["files"][kind][name] = {runtime: judge(path, runtime, reference) for runtime in RUNTIMES}
    log["missed"] = [
        f"{name} ({kind}, {runtime})"
        for kind, faults in log["files"].items()
        for name, found in faults.items()
        for runtime, each in found.items()
        if each["refused"] == (name == "right")
    ]
    log["seconds"] = round(time.process_time() - started, 1)
    out = Path(__file__).parent / "results" / "planted_faults.json"
    out.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(len(faults) - 1 for faults in log['files'].values())} faulty files, missed: {log['missed'] or 'none'}")


if __name__ == "__main__":
    main()
