"""The machine's measured roofline: how many operations and how many bytes a second it can do at best.

Williams et al., "Roofline", CACM 52(4), 2009: a layer can run no faster than the compute peak, nor than its bytes at
the memory's bandwidth. Both are measured, since what a data sheet says no runtime reaches:

- *Compute peak*, float32 and int8: a 3 x 3 convolution with 128 channels on 28 x 28 (0.23 G multiply-adds; every size
  a multiple of 16) in each runtime that is installed, ONNX Runtime and OpenVINO, and a product of two 1024 x 1024
  matrices in PyTorch. The best call counts, and the best engine is the machine's peak.
- *Bandwidth*: a copy, read and write counted once each, of four times the last-level cache ("memory"), and of a
  quarter of it ("cache"). Departure from the paper, which has one bandwidth: small networks live in the cache, where a
  single roof from memory would promise too little.

Operations are 2 x multiply-adds, for int8 too. The figures are kept in the user's cache folder, for this machine,
number of threads and versions of what measured; `tersenet doctor` measures them anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.atomic import writing
from tersenet.cache import cache_folder
from tersenet.deploy.machine import machine
from tersenet.deploy.runtimes import torch_threads
from tersenet.errors import TersenetError

SCHEMA = 1
PRECISIONS = ("float32", "int8")
_SECONDS = 0.3  # of each figure
_CHANNELS, _SIZE, _MATRIX = 128, 28, 1024
_USUAL_CACHE = 32 * 2**20  # where the system does not say
_MOST_COPIED = 512 * 2**20
Say = Callable[[str], None]


@dataclass(frozen=True)
class Roofline:
    """What the machine reached at best.

    Args:
        threads: with how many.
        flops: precision -> engine -> operations per second.
        memory: bytes per second of a copy beyond the caches.
        cache: bytes per second of a copy within the last-level cache.
        cache_bytes: its size.
        lanes: how many float32 a vector register holds.
    """

    threads: int
    flops: dict[str, dict[str, float]]
    memory: float
    cache: float
    cache_bytes: int
    lanes: int

    def peak(self, precision: str) -> float:
        """Operations per second; of float32 where nothing measures this precision."""
        return max((self.flops.get(precision) or self.flops["float32"]).values())

    def bandwidth(self, size: float) -> float:
        """Bytes per second for something of this size that is used again and again."""
        return self.cache if size <= self.cache_bytes / 2 else self.memory

    def least_seconds(self, flops: float, precision: str, moved: float, resident: float) -> tuple[float, float]:
        """At least so long for the operations, and for the bytes.

        Args:
            flops: 2 x multiply-adds.
            moved: bytes.
            resident: how much memory they are part of, which says where they lie.
        """
        return flops / self.peak(precision), moved / self.bandwidth(resident)

    def attainable(self, intensity: float, precision: str = "float32", resident: float = math.inf) -> float:
        """The roof itself: operations per second at an intensity (operations per byte)."""
        return min(self.peak(precision), intensity * self.bandwidth(resident))


def roofline(threads: int = 1, *, again: bool = False, say: Say = lambda _: None) -> Roofline:
    """The roofline of this machine: from the cache, else measured now and kept (a few seconds).

    Args:
        threads: how many one call may use.
        again: measure even though it is known.
        say: gets a line before measuring, and one on what is wrong with the cache.
    """
    here = _key(threads)
    path = _path(here)
    if not again and (known := _read(path, here, say)) is not None:
        return known
    say(f"measuring what this machine can do at best with {threads} thread{'s' if threads > 1 else ''} (seconds)")
    found = measured(threads)
    try:
        with writing(path) as part:
            part.write_text(json.dumps({"schema": SCHEMA, "key": here, "roofline": asdict(found)}))
    except TersenetError as error:
        say(f"the roofline was not kept: {error}")
    return found


def measured(threads: int, seconds: float = _SECONDS) -> Roofline:
    """Measures now. `seconds` is for each figure."""
    flops: dict[str, dict[str, float]] = {precision: {} for precision in PRECISIONS}
    for precision in PRECISIONS:
        for engine, prepare in _ENGINES.items():
            ready = prepare(precision, threads)
            if ready is not None:
                operations, call = ready
                with torch_threads(threads):
                    flops[precision][engine] = operations / _best(call, seconds)
    size = _last_cache()
    return Roofline(
        threads,
        flops,
        memory=_copied(min(4 * size, _MOST_COPIED), threads, seconds),
        cache=_copied(size // 4, threads, seconds),
        cache_bytes=size,
        lanes=_lanes(),
    )


def _key(threads: int) -> dict[str, Any]:
    """What the figures hold for: the machine, the threads, and the versions of what measured."""
    here = machine()
    names = ("cpu", "architecture", "cores", "flags", "memory_bytes")
    versions = {name: here["packages"][name] for name in ("torch", "onnxruntime", "openvino")}
    return {"machine": {name: here[name] for name in names}, "threads": threads, "versions": versions}


def _path(key: dict[str, Any]) -> Path:
    """One file for a machine and its threads; another version's figures are replaced there."""
    said = json.dumps([key["machine"], key["threads"]], sort_keys=True)
    return cache_folder() / "roofline" / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"


def _read(path: Path, key: dict[str, Any], say: Say) -> Roofline | None:
    """The kept figures, or None, with a word on why where there is a file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        say(f"the roofline kept in {path} cannot be read; it is measured again")
        return None
    try:
        kept = json.loads(text)
        if kept["schema"] != SCHEMA or kept["key"] != key:
            say(f"the roofline kept in {path} is from another machine or version; it is measured again")
            return None
        return _checked(kept["roofline"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        say(f"the roofline kept in {path} is damaged; it is measured again")
        return None


def _checked(kept: dict[str, Any]) -> Roofline:
    """Raises ValueError or TypeError on what could not have been measured."""
    found = Roofline(**{each.name: kept[each.name] for each in fields(Roofline)})
    numbers = [found.memory, found.cache, found.cache_bytes, found.lanes, found.threads]
    numbers += [value for engines in found.flops.values() for value in engines.values()]
    if not found.flops["float32"] or not all(math.isfinite(value) and value > 0 for value in numbers):
        raise ValueError("a roofline of nothing")
    return found


def _best(call: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest call; the first two are not counted."""
    call(), call()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _copied(size: int, threads: int, seconds: float) -> float:
    """Bytes per second of a copy whose two arrays have `size` bytes together."""
    import torch

    source = torch.ones(size // 8)
    target = torch.zeros_like(source)
    with torch_threads(threads):
        return 2 * source.nbytes / _best(lambda: target.copy_(source), seconds)


def _last_cache() -> int:
    """Bytes of the largest cache of the first core."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]])
    return max(sizes, default=_USUAL_CACHE)


def _lanes() -> int:
    flags = set(machine()["flags"])
    return 16 if "avx512f" in flags else 8 if "avx2" in flags else 4


def _torch_product(precision: str, threads: int) -> tuple[float, Callable[[], Any]] | None:
    import torch

    if precision != "float32":
        return None
    left = torch.randn(_MATRIX, _MATRIX)
    right, out = left.clone(), torch.empty_like(left)
    return 2.0 * _MATRIX**3, lambda: torch.mm(left, right, out=out)


def _onnxruntime_convolution(precision: str, threads: int) -> tuple[float, Callable[[], Any]] | None:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_convolution(precision), options, providers=["CPUExecutionProvider"])
    x = _image()
    return _operations(), lambda: session.run(None, {"x": x})


def _openvino_convolution(precision: str, threads: int) -> tuple[float, Callable[[], Any]] | None:
    try:
        import onnx  # noqa: F401
        import openvino
    except ImportError:
        return None
    from tersenet.deploy.profile_openvino import SETTINGS

    core = openvino.Core()
    settings = {**SETTINGS, "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(core.read_model(_convolution(precision)), "CPU", settings).create_infer_request()
    x = _image()
    return _operations(), lambda: request.infer([x], share_inputs=True)


_ENGINES: dict[str, Callable[[str, int], tuple[float, Callable[[], Any]] | None]] = {
    "pytorch": _torch_product,
    "onnxruntime": _onnxruntime_convolution,
    "openvino": _openvino_convolution,
}


def _operations() -> float:
    return 2.0 * 9 * _CHANNELS**2 * _SIZE**2


def _image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, _CHANNELS, _SIZE, _SIZE)).astype(np.float32)


def _convolution(precision: str) -> bytes:
    """An ONNX file of one convolution; in int8 with the quantizers around it that runtimes turn into integers."""
    from onnx import TensorProto, helper, numpy_helper

    node, number = helper.make_node, numpy_helper.from_array
    weight = np.random.default_rng(1).standard_normal((_CHANNELS, _CHANNELS, 3, 3)).astype(np.float32)
    if precision == "float32":
        tensors = [number(weight, "w")]
        nodes = [node("Conv", ["x", "w"], ["y"], pads=[1] * 4)]
    else:
        tensors = [number(np.clip(weight * 30, -127, 127).astype(np.int8), "w"), number(np.float32(0.05), "scale")]
        tensors += [number(np.uint8(128), "zero"), number(np.int8(0), "middle")]
        nodes = [
            node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            node("DequantizeLinear", ["w", "scale", "middle"], ["v"]),
            node("Conv", ["d", "v"], ["c"], pads=[1] * 4),
            node("QuantizeLinear", ["c", "scale", "zero"], ["e"]),
            node("DequantizeLinear", ["e", "scale", "zero"], ["y"]),
        ]
    shape = [1, _CHANNELS, _SIZE, _SIZE]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    graph = helper.make_graph(nodes, "peak", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
