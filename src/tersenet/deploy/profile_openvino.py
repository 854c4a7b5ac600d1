"""Times of the operators in OpenVINO, each brought back to the layer that it came from.

With PERF_COUNT on, OpenVINO's CPU plugin keeps the time of each operator of its own graph. What it gives is the mean
over all calls since the model was compiled, in whole microseconds rounded down, so that one slow call, such as the
first, is in every later figure. Here the model is compiled anew for each window of `WINDOW` calls, the first `WARM` are
taken out again by the difference of two sums, and the median over the windows counts. A time may be about 2
microseconds too small.

OpenVINO's graph says which operators of the file went into each of its own ("originalLayersNames"), and the file's
operators are numbered (`profile_onnx.Numbered`), so the way back is to read the numbers. An operator that swallowed
others counts as the convolution or matrix product among them, else as the first. What came from none, such as a change
of memory layout ("Reorder"), keeps its own type.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tersenet.deploy.profile_onnx import Numbered, Times
from tersenet.deploy.work import Key
from tersenet.errors import require

# As in `runtimes`: the precision of the file, one request at a time.
SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
    "ENABLE_CPU_PINNING": False,
}
WINDOW, WARM = 30, 4
_NUMBER = re.compile(r"operator(\d+)_")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")


class OpenvinoProfiler:
    """A model in OpenVINO with its counters on; call it as often as wanted, then take the times.

    Args:
        source: the file to profile.
        threads: how many one call may use.
    """

    def __init__(self, source: Numbered, threads: int) -> None:
        openvino = require("openvino", "openvino", "profile in OpenVINO")
        self.source = source
        self.core = openvino.Core()
        self.model = self.core.read_model(str(source.path))
        self.settings = {**SETTINGS, "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
        self.samples: dict[str, list[float]] = defaultdict(list)
        self.kinds: dict[str, str] = {}
        self.origins: dict[str, str] = {}
        self.warm: dict[str, float] = {}
        self._open()

    def __call__(self, x: tuple[np.ndarray, ...]) -> None:
        if self.calls == WINDOW:
            self._close()
            self._open()
        self.request.infer(list(x), share_inputs=True)
        self.calls += 1
        if self.calls == WARM:
            self.warm = self._means()

    def times(self) -> Times:
        """Median milliseconds of each operator that ran, under the row that it belongs to."""
        self._close()
        return brought_back(self.source, self.samples, self.kinds, self.origins)

    def _open(self) -> None:
        self.compiled = self.core.compile_model(self.model, "CPU", self.settings)
        self.request = self.compiled.create_infer_request()
        self.calls = 0
        self.warm = {}

    def _close(self) -> None:
        """Ends a window; one with less than half of its calls counts only where there is no other."""
        if self.calls <= WARM or (self.samples and self.calls < WINDOW // 2):
            return
        for name, mean in self._means().items():
            self.samples[name].append(after_warming(mean, self.calls, self.warm.get(name, 0.0)))
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            self.origins[node.get_friendly_name()] = _text(node.get_rt_info(), "originalLayersNames")

    def _means(self) -> dict[str, float]:
        """Milliseconds of each operator that ran, over all calls of this window."""
        means = {}
        for entry in self.request.get_profiling_info():
            if str(entry.status).endswith(".EXECUTED"):
                means[entry.node_name] = entry.real_time.total_seconds() * 1e3
                self.kinds[entry.node_name] = entry.node_type
        return means


def after_warming(mean: float, calls: int, warm: float) -> float:
    """The mean over the calls after the first `WARM`, from the mean over all and that over the first."""
    return max((calls * mean - WARM * warm) / (calls - WARM), 0.0)


def brought_back(
    source: Numbered, samples: Mapping[str, Iterable[float]], kinds: Mapping[str, str], origins: Mapping[str, str]
) -> Times:
    """Median milliseconds of each operator, under the row that it belongs to.

    Args:
        source: the numbered file.
        samples: name of an executed operator -> milliseconds in each window.
        kinds: name of an executed operator -> its type, the name of a row that no layer has.
        origins: name of an executed operator -> names of the file's operators that went in, with commas.
    """
    times: Times = defaultdict(list)
    for name, milliseconds in samples.items():
        key = _row(source, origins.get(name, ""))
        times[key or ("", kinds[name])].append(float(np.median(list(milliseconds))))
    return times


def _row(source: Numbered, names: str) -> Key | None:
    numbers = [int(found) for found in _NUMBER.findall(names)]
    product = next((number for number in numbers if source.graph.node[number].op_type in _PRODUCTS), None)
    if product is not None:
        return source.rows[product]
    return next((source.rows[number] for number in numbers if source.rows[number] is not None), None)


def _text(said: Any, name: str) -> str:
    value = said[name] if name in said else ""  # noqa: SIM401  the map of OpenVINO has no get
    return str(getattr(value, "value", value))
