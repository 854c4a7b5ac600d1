"""The file itself in ONNX Runtime: what an import is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tersenet.errors import ModelError, require
from tersenet.onnx_import.read import File

_LARGEST = 2**31 - 2**20  # a protobuf in memory must stay under 2 GiB


class Original:
    """Runs a file with any batch.

    Args:
        file: that was read.
        channels_last: whether its first input is (N, H, W, C); it is given as (N, C, H, W).
    Raises:
        ModelError: when ONNX Runtime does not take it.
        MissingExtra: when onnxruntime is not installed.
    """

    def __init__(self, file: File, channels_last: bool) -> None:
        self.file, self.channels_last = file, channels_last
        self.outputs = [value.name for value in file.proto.graph.output]
        self.session = self._session(file.proto, optimized=True)
        sizes = {each.shape[0] for each in file.inputs}
        if len(sizes) > 1:
            raise ModelError(f"{file.name} has inputs of different batches; inputs of one batch are supported")
        self.batch = sizes.pop()

    def _session(self, proto: Any, optimized: bool) -> Any:
        ort = require("onnxruntime", "onnx", "check what was read from ONNX files")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        source = self.file.name if proto.ByteSize() > _LARGEST else proto.SerializeToString()
        try:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own kinds
            raise ModelError(f"ONNX Runtime does not open {self.file.name}: {_line(error)}") from error

    def takes(self, arrays: Sequence[np.ndarray]) -> bool:
        """Whether the file runs on a batch; some say that theirs is open, and are written for one sample."""
        try:
            self._call(self.session, arrays)
        except Exception:  # noqa: BLE001 - the runtime's own kinds
            return False
        return True

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All outputs; a file with a batch of its own is run in pieces.

        Raises:
            ModelError: when it does not run.
        """
        if self.batch is None:
            return self._tried(arrays)
        count, pieces = len(arrays[0]), []
        for start in range(0, count, self.batch):
            part = [each[start : start + self.batch] for each in arrays]
            gap = self.batch - len(part[0])
            part = [np.concatenate([each, np.repeat(each[:1], gap, axis=0)]) for each in part]
            outputs = self._tried(part)
            pieces.append([each[: self.batch - gap] if each.ndim else each for each in outputs])
        return [np.concatenate(each) if each[0].ndim else each[0] for each in zip(*pieces, strict=True)]

    def values(self, arrays: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Inner values by name, of one call with the file's own batch."""
        from onnx import ModelProto, helper

        proto = ModelProto()
        proto.CopyFrom(self.file.proto)
        own = {value.name for value in proto.graph.output}
        for name in names:
            if name not in own:
                proto.graph.output.append(helper.make_empty_tensor_value_info(name))
        session = self._session(proto, optimized=False)
        return dict(zip(names, self._call(session, arrays, names), strict=True))

    def _tried(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        try:
            return self._call(self.session, arrays)
        except Exception as error:  # the runtime's own kinds
            raise ModelError(f"{self.file.name} does not run in ONNX Runtime: {_line(error)}") from error

    def _call(self, session: Any, arrays: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Any:
        given = {each.name: array for each, array in zip(self.file.inputs, arrays, strict=True)}
        if self.channels_last:
            first = self.file.inputs[0].name
            given[first] = np.ascontiguousarray(given[first].transpose(0, 2, 3, 1))
        return session.run(list(names or self.outputs), given)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
