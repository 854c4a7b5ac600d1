"""Per layer of a .terse file: the time to rebuild its weights against the time to run it, and the resident bytes.

    python benchmarks/rebuild_layers.py FILE.terse... [--out FILE.json]

`rebuild_ms` is the best of five decodings of all tensors of a layer on one thread, `run_ms` the median time of a layer
in PyTorch for one sample on one thread; `calls` is how many samples it takes until running costs more than rebuilding.
Resident are the coded bytes before a layer is touched (`tersenet.load(..., lazy=True)`), the decoded ones after.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tersenet.codec import container
from tersenet.deploy.artifact import load_terse
from tersenet.deploy.machine import machine
from tersenet.deploy.profile import profile_model


def rebuild_ms(stored: container.Stored, names: list[str]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for name in names:
            stored.tensor(name)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def layers(path: Path) -> dict[str, Any]:
    stored = container.read_coded(path)
    model = load_terse(path)
    shape = [1, *(size or 1 for size in model.input_shape[1:])]  # type: ignore[index, union-attr]
    ran: dict[str, float] = {}
    for row in profile_model(model, torch.randn(shape), runtime="pytorch")["rows"]:
        ran[row["path"]] = ran.get(row["path"], 0.0) + (row["ms"] or 0.0)
    tensors = {row["name"]: row for row in stored.contents.rows()}
    owned: dict[str, list[str]] = {}
    for name in tensors:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    rows = []
    for layer, names in owned.items():
        largest = max((tensors[name] for name in names), key=lambda row: row["decoded_bytes"])
        rebuilt, run = rebuild_ms(stored, names), ran.get(layer, 0.0)
        rows.append(
            {
                "layer": layer, "shape": largest["shape"], "codec": largest["codec"],
                "coded_bytes": sum(tensors[name]["bytes"] for name in names),
                "decoded_bytes": sum(tensors[name]["decoded_bytes"] for name in names),
                "rebuild_ms": round(rebuilt, 4), "run_ms": round(run, 4),
                "calls": round(rebuilt / run, 1) if run else None,
            }
        )  # fmt: skip
    totals = {
        key: round(sum(row[key] for row in rows), 4) for key in ("coded_bytes", "decoded_bytes", "rebuild_ms", "run_ms")
    }
    return {"file": path.name, "file_bytes": path.stat().st_size, "totals": totals, "rows": rows}


def main(arguments: list[str]) -> None:
    out = arguments.pop(arguments.index("--out") + 1) if "--out" in arguments else None
    torch.set_num_threads(1)
    found = []
    for path in (Path(argument) for argument in arguments if argument != "--out"):
        found.append(layers(path))
        print(json.dumps(found[-1]["totals"]), flush=True)
        for row in found[-1]["rows"]:
            print(
                f"{row['layer']:24} {row['codec']:9} {row['coded_bytes']:8} of {row['decoded_bytes']:8} bytes, "
                f"rebuilt in {row['rebuild_ms']:7.3f} ms, run in {row['run_ms']:7.3f} ms"
            )
    if out is not None:
        Path(out).write_text(json.dumps({"machine": machine(), "files": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
