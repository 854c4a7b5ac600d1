"""The files of zoo/cifar10-resnet56-fast against the float ResNet-56 and two int8 networks, timed in one run each.

    python benchmarks/fast_resnet56.py --float FLOAT.onnx --files FILE.onnx ... --out LOG.json

One thread and two, batch 1 and 32, in ONNX Runtime and OpenVINO; each file in its own pinned process, in turns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tersenet.deploy.machine import machine
from tersenet.deploy.measure import measure_files

SETTINGS = ((1, 1), (2, 1), (1, 32))  # threads, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--float", type=Path, required=True)
    parser.add_argument("--files", type=Path, nargs="+", required=True)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    log: dict[str, Any] = {"machine": machine(), "runs": []}
    for runtime in arguments.runtimes:
        for threads, batch in SETTINGS:
            paths = [arguments.float, *arguments.files]
            found = measure_files(paths, [runtime], threads=threads, batch=batch)
            whole = (str(arguments.float), runtime)
            run: dict[str, Any] = {"runtime": runtime, "threads": threads, "batch": batch, "noise": found.noise}
            run["files"] = {}
            for path in arguments.files:
                ratio = found.ratio(whole, (str(path), runtime))
                run["files"][f"{path.parent.name}/{path.name}"] = {
                    "ms": found.latency((str(path), runtime))["median"],
                    "times_faster": [ratio.ratio, ratio.low, ratio.high],
                }
            run["float_ms"] = found.latency(whole)["median"]
            log["runs"].append(run)
            print(json.dumps(run), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
