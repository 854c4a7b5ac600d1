"""Our coder against NNCodec's, the reference software of ISO/IEC 15938-17, on the same whole numbers.

    python benchmarks/against_nncodec.py WEIGHTS.safetensors:grid:0.45 ... [--rounds 15] [--out FILE.json]

A CASE is one of benchmarks/codec_speed.py. NNCodec is given the integers and codes them without loss (no rounding of
its own, parameters optimised, row skipping), ours the float32 weights, whose grid it has to find. Both give them back
bit for bit, which is checked. Contenders take turns; processor seconds of one thread, as MB of float32 a second.

`pip install --no-deps nncodec==2.1.3` beside tersenet, and pybind11 to build it; what else it lists is for training and
data, which is put aside here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from codec_speed import changed, weights

from tersenet.codec import container
from tersenet.codec.values import grid_of
from tersenet.deploy.machine import machine


class _Aside(types.ModuleType):
    """Stands for a package that the coder imports and does not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Aside(name)


def theirs(numbers: dict[str, np.ndarray], folder: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    for name in ("nncodec.framework", "pandas", "h5py"):
        sys.modules.setdefault(name, _Aside(name))
    from nncodec import nnc  # type: ignore[import-not-found]

    def encode() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return nnc.compress(
                {name: each.copy() for name, each in numbers.items()}, bitstream_path=os.path.join(folder, "x.nnc"),
                use_dq=False, param_opt=True, row_skipping=True, return_bitstream=True, verbose=False,
            )  # fmt: skip

    def decode(stream: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return nnc.decompress(stream)

    return encode, decode


def measured(case: str, rounds: int) -> dict[str, Any]:
    source, kind, *amount = case.split(":")
    tensors = {name: changed(weight, kind, float((amount or ["0"])[0])) for name, weight in weights(source).items()}
    numbers = {}
    for name, weight in tensors.items():
        found = grid_of(weight.reshape(-1).numpy())
        assert found is not None
        numbers[name] = found[1].reshape(weight.shape)
    total = sum(weight.nbytes for weight in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        encode, decode = theirs(numbers, folder)
        stream, file = encode(), Path(folder) / "x.terse"
        back = decode(stream)
        assert all(np.array_equal(np.asarray(back[name]).reshape(each.shape), each) for name, each in numbers.items())
        container.write(file, {}, tensors)
        assert all(torch.equal(each, tensors[name]) for name, each in container.read(file)[1].items())
        works: dict[str, Callable[[], Any]] = {
            "nncodec encode": encode, "tersenet encode": lambda: container.pack({}, tensors),
            "nncodec decode": lambda: decode(stream), "tersenet decode": lambda: container.read(file),
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                start = time.process_time()
                work()
                seconds[name].append(time.process_time() - start)
        speeds = {name: round(total / statistics.median(each) / 1e6, 1) for name, each in seconds.items()}
        return {
            "case": f"{Path(source).stem}:{kind}" + "".join(f":{a}" for a in amount), "float32": total,
            "bytes": {"nncodec": len(stream), "tersenet": file.stat().st_size}, "mb_per_s": speeds,
            "ratios": {
                what: round(
                    statistics.median(
                        a / b for a, b in zip(seconds[f"nncodec {what}"], seconds[f"tersenet {what}"], strict=True)
                    ), 3,
                )
                for what in ("encode", "decode")
            },
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in options.cases:
        rows.append(measured(case, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        found = {"machine": machine(), "rounds": options.rounds, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
