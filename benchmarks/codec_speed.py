"""How small and how fast the codec is: weights put on a grid of a share of their deviation, per layer.

    python benchmarks/codec_speed.py WEIGHTS.safetensors [STEP]

STEP is in standard deviations of each layer (default 0.7, about 2.4 bits a weight). Prints the bytes with every form of
numbers alone and with the smallest of all, and megabytes of float32 a second of processor time on one thread, as the
best of three. Nothing here says what the step does to a network's score.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tersenet.codec import container, numbers


def seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main(path: str, share: float = 0.7) -> None:
    tensors = {}
    for name, weight in load_file(path).items():
        if weight.ndim > 1:
            step = weight.std() * share
            tensors[name] = (weight / step).round() * step + 0.0
    total = sum(weight.nbytes for weight in tensors.values())
    for form in numbers.FORMS[2:]:
        print(f"{form:12} {len(container.pack({}, tensors, forms=(form,))):10} bytes")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.terse"
        container.write(file, {}, tensors)
        size = file.stat().st_size
        encode = total / seconds(lambda: container.pack({}, tensors)) / 1e6
        decode = total / seconds(lambda: container.read(file)) / 1e6
    print(f"{'smallest':12} {size:10} bytes, {total / size:.2f} times smaller than float32")
    print(f"encode {encode:.1f} MB/s, decode {decode:.1f} MB/s of float32")


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
