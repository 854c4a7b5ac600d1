"""Other widths and depths of a network, made by changing its ONNX file instead of exporting it anew.

A search times hundreds of shapes of one network. Exporting each takes seconds, changing the file milliseconds: the
tensors of a cut layer are sliced, a dropped block is bypassed, everything else stays as the exporter wrote it. So a
variant has the operators that the exporter would write, and any numbers; it is for timing and sizes, never to ship.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.deploy.onnx_packing import make_floats_once, pack_constants
from tersenet.errors import ExportError, require

Cut = Mapping[str, Mapping[str, Sequence[int]]]
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_AFTER_ADD = ("Relu", "Clip", *_ROUNDING)


class Variants:
    """The variants of one ONNX file that tersenet wrote.

    Args:
        path: of the file; its layers are known by the names of their tensors ("layer1.0.conv1.weight").
    """

    def __init__(self, path: str | Path) -> None:
        onnx = require("onnx", "onnx", "time variants of a network")
        self._onnx = onnx
        self.model = onnx.load(str(path))
        graph = self.model.graph
        del graph.value_info[:]  # shapes inside change
        self.tensors = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
        self.maker = {name: index for index, node in enumerate(graph.node) for name in node.output}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(graph.node):
            for name in node.input:
                self.readers.setdefault(name, []).append(index)
        self.layers = self._find_layers()

    def _find_layers(self) -> dict[str, list[int]]:
        """Path of a layer -> its operators that hold a weight."""
        found: dict[str, list[int]] = {}
        for index, node in enumerate(self.model.graph.node):
            if node.op_type in _ROUNDING:
                continue
            for name in node.input:
                source = self._source(name)
                if source in self.tensors and source.endswith(".weight"):
                    path = source.removesuffix(".weight").removesuffix(".layer")
                    found.setdefault(path, []).append(index)
        return found

    def _source(self, name: str) -> str:
        """The constant behind a value that is a constant or a dequantized one."""
        while name in self.maker and self.model.graph.node[self.maker[name]].op_type in _ROUNDING:
            name = self.model.graph.node[self.maker[name]].input[0]
        return name

    def make(
        self,
        kept: Cut,
        dropped: Collection[str] = (),
        floated: Collection[str] = (),
        bits: Mapping[str, int] | None = None,
        pack: bool = False,
    ) -> bytes:
        """The file of a variant.

        Args:
            kept: {layer path: {role: kept indices}}, as `graph.surgery.cut` takes it; layers not in the file are left
                out, such as norms that were folded.
            dropped: paths of blocks that add something to their input.
            floated: paths of int8 layers that are to be float; one that reads the input then reads it unrounded.
            bits: {path of an int8 layer: bits that its weights are to take}.
            pack: whether weights that need fewer bits than 8 take no more, as in files that ship.
        Raises:
            ExportError: when a layer or block cannot be changed in the file.
        """
        changed = self._onnx.ModelProto()
        changed.CopyFrom(self.model)
        graph = changed.graph
        fresh: dict[str, np.ndarray] = {}
        for path, roles in kept.items():
            for index in self.layers.get(path, ()):
                self._shrink(graph, index, path, roles, fresh)
        for block in dropped:
            self._bypass(graph, block)
        for path in floated:
            for index in self.layers.get(path, ()):
                self._float(graph, graph.node[index], path, fresh)
        for path, count in (bits or {}).items():
            for index in self.layers.get(path, ()):
                self._shorten(graph, graph.node[index], path, count, fresh)
        _sweep(graph)
        if dropped:
            self._fit_biases(graph, fresh)
        used = {name for node in graph.node for name in node.input} | {each.name for each in graph.output}
        rest = [each for each in graph.initializer if each.name in used and each.name not in fresh]
        del graph.initializer[:]
        graph.initializer.extend(rest)
        graph.initializer.extend(
            self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
            for name, value in fresh.items()
            if name in used
        )
        make_floats_once(self._onnx, changed)
        if pack:
            pack_constants(self._onnx, changed)
        return changed.SerializeToString()

    def _fit_biases(self, graph: Any, fresh: dict[str, np.ndarray]) -> None:
        """The scale of an integer bias is that of the input times those of the weights, or runtimes do not fuse it; an
        input that comes from elsewhere now has another scale."""
        maker = {name: node for node in graph.node for name in node.output}
        tensors = {**self.tensors, **fresh}
        for node in list(graph.node):
            found = [maker.get(name) for name in node.input[:3]]
            parts = [part for part in found if part is not None and part.op_type == "DequantizeLinear"]
            if len(parts) < 3:
                continue
            value, weight, bias = (tensors[part.input[1]] for part in parts)
            if value.ndim == 0 and bias.shape == weight.shape and bias.ndim == 1:
                fresh[f"{node.output[0]}|bias_scale"] = (value * weight).astype(np.float32)
                parts[2].input[1] = f"{node.output[0]}|bias_scale"

    def _float(self, graph: Any, node: Any, path: str, fresh: dict[str, np.ndarray]) -> None:
        """Puts float weights in place of dequantized ones, and the file's input in place of the rounded one."""
        makers = {name: each for each in graph.node for name in each.output}
        inputs = {each.name for each in graph.input}
        for place, name in enumerate(node.input):
            rounding = makers.get(name)
            if rounding is None or rounding.op_type != "DequantizeLinear":
                continue
            value = fresh.get(rounding.input[0], self.tensors.get(rounding.input[0]))
            if value is not None:
                scale = fresh.get(rounding.input[1], self.tensors.get(rounding.input[1]))
                assert scale is not None, f"the scale of {path} is no constant"
                made = f"{path}|{place}.float"
                fresh[made] = (value * scale.reshape(-1, *(1,) * (value.ndim - 1))).astype(np.float32)
                node.input[place] = made
            elif makers[rounding.input[0]].input[0] in inputs:
                node.input[place] = makers[rounding.input[0]].input[0]

    def _shorten(self, graph: Any, node: Any, path: str, bits: int, fresh: dict[str, np.ndarray]) -> None:
        """Brings the integers of a layer's weights into the range of fewer bits."""
        makers = {name: each for each in graph.node for name in each.output}
        for name in node.input:
            rounding = makers.get(name)
            if rounding is None or rounding.op_type != "DequantizeLinear":
                continue
            value = fresh.get(rounding.input[0], self.tensors.get(rounding.input[0]))
            if value is not None and value.dtype == np.int8 and value.ndim > 1:
                high = 2 ** (bits - 1) - 1
                rounding.input[0] = f"{path}|few.weight"
                fresh[rounding.input[0]] = np.clip(value, -high if bits > 1 else 0, max(high, 1))

    def _shrink(
        self, graph: Any, index: int, path: str, roles: Mapping[str, Sequence[int]], fresh: dict[str, np.ndarray]
    ) -> None:
        """Slices the tensors of one operator. They get names of their own, because equal tensors are shared."""
        node = graph.node[index]
        groups = next((each for each in node.attribute if each.name == "group"), None)
        out, into = roles.get("out"), roles.get("in")
        if "channel" in roles:  # of a depthwise layer each channel gives one or several outputs
            times = 1 if groups is None else self._outputs(graph, node, fresh) // groups.i
            out = [channel * times + i for channel in roles["channel"] for i in range(times)]
        for place, name in enumerate(node.input):
            source = self._source(name)
            if source not in self.tensors:
                continue
            if source == name:
                node.input[place] = self._sliced(node, path, place, name, out, into, fresh)
                continue
            rounding = graph.node[self.maker[name]]
            for inner, part in enumerate(rounding.input):
                rounding.input[inner] = self._sliced(node, path, place, part, out, into, fresh, inner)
        if groups is not None and "channel" in roles:
            groups.i = len(roles["channel"])
        if into is not None and node.op_type in ("Gemm", "MatMul"):
            self._reshape(graph, index, path, len(into), fresh)

    def _outputs(self, graph: Any, node: Any, fresh: Mapping[str, np.ndarray]) -> int:
        """How many outputs a convolution has: the rows of its weight."""
        name = node.input[1]
        name = name if self._source(name) == name else graph.node[self.maker[name]].input[0]
        return len(self.tensors[name] if name in self.tensors else fresh[name])

    def _sliced(
        self,
        node: Any,
        path: str,
        place: int,
        name: str,
        out: Sequence[int] | None,
        into: Sequence[int] | None,
        fresh: dict[str, np.ndarray],
        inner: int = 0,
    ) -> str:
        value = self.tensors.get(name)
        if value is None:  # was renamed in an earlier pass over the same operator
            value = fresh[name]
        if value.ndim == 0:
            return name
        rows, columns = _axes(node, value)
        if out is not None and rows is not None and value.shape[rows] > max(out, default=0):
            value = np.take(value, out, axis=rows)
        if into is not None and columns is not None and inner == 0 and value.ndim > 1:
            per_group = [each for each in into if each < value.shape[columns]]
            value = np.take(value, per_group, axis=columns)
        made = f"{path}|{place}.{inner}"
        fresh[made] = value
        return made

    def _reshape(self, graph: Any, index: int, path: str, size: int, fresh: dict[str, np.ndarray]) -> None:
        """A reshape in front of a linear layer may have its width written into it."""
        name = graph.node[index].input[0]
        while name in self.maker:
            node = graph.node[self.maker[name]]
            if node.op_type == "Reshape" and node.input[1] in self.tensors:
                shape = self.tensors[node.input[1]].copy()
                shape[-1] = size if shape[-1] > 0 else shape[-1]
                fresh[f"{path}|shape"] = shape
                node.input[1] = f"{path}|shape"
                return
            if node.op_type not in (*_AFTER_ADD, "Dropout", "Identity"):
                return
            name = node.input[0]

    def _bypass(self, graph: Any, block: str) -> None:
        """Hands the input of a residual block to everything that read its output."""
        inside = {
            i for path, found in self.layers.items() if path == block or path.startswith(block + ".") for i in found
        }
        if not inside:
            raise ExportError(f"the block {block!r} has no layer in the file, so that it cannot be taken out there")
        last = max(inside)
        name = graph.node[last].output[0]
        while True:
            readers = self.readers.get(name, [])
            if len(readers) != 1:
                raise ExportError(f"what the block {block!r} adds is read in {len(readers)} places of the file")
            node = graph.node[readers[0]]
            if node.op_type in ("Add", "Sum"):
                break
            name = node.output[0]
        skip = next((each for each in node.input if each != name), None)
        if skip is None or skip in self.tensors:
            raise ExportError(f"the block {block!r} does not end in an addition to its input")
        result = node.output[0]
        while len(self.readers.get(result, [])) == 1:
            following = graph.node[self.readers[result][0]]
            if following.op_type not in _AFTER_ADD:
                break
            result = following.output[0]
        for other in graph.node:
            for place, each in enumerate(other.input):
                if each == result:
                    other.input[place] = skip
        # Blocks in a row: what was handed on may itself be handed on.
        for place in range(len(graph.output)):
            if graph.output[place].name == result:
                raise ExportError(f"the block {block!r} makes the output of the file")


def _axes(node: Any, value: np.ndarray) -> tuple[int | None, int | None]:
    """(axis of the outputs, axis of the inputs) of a tensor of an operator."""
    if value.ndim == 1:
        return 0, None
    if node.op_type == "MatMul":
        return value.ndim - 1, value.ndim - 2
    if node.op_type == "Gemm":
        turned = any(each.name == "transB" and each.i for each in node.attribute)
        return (0, 1) if turned else (1, 0)
    if node.op_type == "ConvTranspose":
        return 1, 0
    return 0, 1


def _sweep(graph: Any) -> None:
    """Takes out operators whose results nobody reads."""
    needed = {each.name for each in graph.output}
    stay = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            stay.append(node)
    del graph.node[:]
    graph.node.extend(reversed(stay))
