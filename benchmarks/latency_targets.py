"""What the dry run of a latency target lands at: ResNet-18, ResNet-50 and MobileNetV2 at 224x224, random weights.

    python benchmarks/latency_targets.py --latency 0.125x --out benchmarks/results/latency_targets.json

Per network: the share of the float file's latency that was predicted for the picked shape, and what the exported file
then had, both from interleaved measurements; the error of the latency table on its random candidates; the seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tersenet import Target, dry_run, open_model, open_task
from tersenet.deploy.machine import machine
from tersenet.targets import recipe_of

NAMES = ("resnet18", "resnet50", "mobilenet_v2")


def one(name: str, latency: str, runtime: str) -> dict[str, Any]:
    data = "random:3x224x224"
    network, preparation = open_model(name, None, 0)
    task = open_task(network, preparation, data, quiet=True)
    target = Target(latency=latency)
    started = time.perf_counter()
    recipe = recipe_of(target=target, data=data, runtime=runtime)
    found = dry_run(network, task, recipe, runtimes=(runtime,), target=target)
    search, rows = found["search"], found["rows"]
    before, after = (row["latency_ms"][runtime] for row in (rows[0], rows[-1]))
    return {
        "asked": latency,
        "predicted_left": search["picked"]["predicted"] / search["original"],
        "measured_left": after["median"] / before["median"],
        "float_ms": before["median"],
        "ms": after["median"],
        "macs_left": rows[-1]["macs"] / rows[0]["macs"],
        "table_error": search["checks"]["error"],
        "search": search,
        "seconds": time.perf_counter() - started,
        "met": found["met"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", default="0.125x")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--names", nargs="+", default=list(NAMES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    log: dict[str, Any] = {"machine": machine(), "threads": 1, "batch": 1, "runtime": arguments.runtime, "networks": {}}
    for name in arguments.names:
        log["networks"][name] = one(name, arguments.latency, arguments.runtime)
        shown = {key: value for key, value in log["networks"][name].items() if key != "search"}
        print(name, json.dumps(shown), flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
