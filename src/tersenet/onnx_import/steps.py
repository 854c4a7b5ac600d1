"""An ONNX graph as a list of steps, with its constants worked out and bias additions joined to their products."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from tersenet.errors import ModelError
from tersenet.onnx_import import reference
from tersenet.onnx_import.call import Branch, Step
from tersenet.onnx_import.fused import Patterns
from tersenet.onnx_import.registry import HANDLERS
from tersenet.onnx_import.values import Host

_SCOPES = "pkg.torch.onnx.name_scopes"
_LARGEST = 2**28  # entries of a constant that is worked out at import
_CONTROL = {"Loop", "Scan", "SequenceMap"}


class Steps:
    """The operators and constants of one graph.

    Args:
        proto: the ModelProto.
        file: its name, for errors.
    Raises:
        ModelError: on an operator that is not known.
    """

    def __init__(self, proto: Any, file: str) -> None:
        self.file = file
        self.version = next((each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")), 1)
        self.constants: dict[str, Host] = {}
        self.outputs = [value.name for value in proto.graph.output]
        self._protos: dict[int, Any] = {}
        self.steps = self._folded(self._of_graph(proto.graph))
        Patterns(self.steps, self.constants).replace(self.steps)
        self._join_biases()
        self._drop_unused()
        readers = Counter(self.constants[name].name for step in _all(self.steps) for name in set(step.inputs)
                          if name in self.constants)  # fmt: skip
        self.shared = {name for name, count in readers.items() if count > 1}
        self._refuse_unknown(self.steps)

    def _of_graph(self, graph: Any) -> list[Step]:
        from onnx import numpy_helper

        for tensor in graph.initializer:
            array = numpy_helper.to_array(tensor)
            learned = array.dtype.kind == "f" and array.size > 1
            self.constants[tensor.name] = Host(array, tensor.name, learned)
        if graph.sparse_initializer:
            raise ModelError(f"{self.file} has sparse initializers, which are not read; store them dense")
        return [self._step(node) for node in graph.node]

    def _step(self, node: Any) -> Step:
        from onnx import helper

        if node.domain not in ("", "ai.onnx"):
            raise ModelError(
                f"{self.file} cannot be imported: operator {node.op_type} of {node.domain} (node "
                f"{node.name or node.output[0]!r}) is not one of ONNX's own; export the model again without the "
                "optimizations of a runtime"
            )
        attributes = {each.name: self._plain(helper.get_attribute_value(each)) for each in node.attribute}
        scopes = next((each.value for each in node.metadata_props if each.key == _SCOPES), "")
        step = Step(
            node.op_type, attributes, list(node.input), list(node.output), node.name, _scopes(scopes), self.version
        )
        self._protos[id(step)] = node
        return step

    def _plain(self, value: Any) -> Any:
        from onnx import GraphProto, TensorProto, numpy_helper

        if isinstance(value, bytes):
            return value.decode(errors="replace")
        if isinstance(value, TensorProto):
            return numpy_helper.to_array(value)
        if isinstance(value, GraphProto):
            return Branch(self._of_graph(value), [each.name for each in value.output])
        if isinstance(value, list | tuple) or type(value).__name__.startswith("Repeated"):
            return [self._plain(each) for each in value]
        return value

    def _folded(self, steps: Iterable[Step]) -> list[Step]:
        """The steps that are left when constants are worked out and decided branches are taken."""
        kept = []
        for step in steps:
            known = [self.constants.get(name) for name in step.inputs if name]
            if step.op == "Constant":
                self._put(step, [_constant(step, self.file)], [])
            elif step.op == "If" and known[0] is not None:
                branch = step.attributes["then_branch" if bool(known[0].array.all()) else "else_branch"]
                kept += self._folded([*branch.steps, *_identities(branch, step)])
            elif step.op == "Identity" and known[0] is not None:
                self.constants[step.outputs[0]] = known[0]
            elif self._is_foldable(step, known) and self._fold(step, [each for each in known if each is not None]):
                continue
            else:
                if step.op == "If":
                    for name in ("then_branch", "else_branch"):
                        step.attributes[name].steps = self._folded(step.attributes[name].steps)
                kept.append(step)
        return kept

    def _is_foldable(self, step: Step, known: list[Host | None]) -> bool:
        if not known or None in known or step.op not in HANDLERS:
            return False
        if step.op in ("Expand", "ConstantOfShape", "Tile"):
            sizes = known[-1].array.astype(object)  # type: ignore[union-attr]
            return bool(abs(np.prod(sizes)) <= _LARGEST)
        return True

    def _fold(self, step: Step, known: list[Host]) -> bool:
        """Whether the reference computes an operator on constants; else it is computed by torch, in the forward."""
        try:
            results = reference.compute(self._protos[id(step)], self.version, [each.array for each in known])
        except Exception:  # noqa: BLE001 - the reference raises many kinds
            return False
        self._put(step, results, known)
        return True

    def _put(self, step: Step, results: list[Any], known: list[Host]) -> None:
        for name, array in zip(step.outputs, results, strict=False):
            learned = array.dtype.kind == "f" and array.size > 1 and any(each.learned for each in known)
            source = next((each.name for each in known if each.learned), name)
            self.constants[name] = Host(array, source if learned else name, learned)

    def _join_biases(self) -> None:
        """A product or convolution with a constant, and the constant that is added to it alone, are one layer."""
        uses = Counter(name for step in _all(self.steps) for name in step.inputs)
        uses.update(name for step in _all(self.steps) for name in _branch_outputs(step))
        uses.update(self.outputs)
        makers = {name: step for step in self.steps for name in step.outputs}
        joined = []
        for step in self.steps:
            if step.op != "Add":
                continue
            for one, other in ((0, 1), (1, 0)):
                product, bias = makers.get(step.inputs[one]), self.constants.get(step.inputs[other])
                if product is None or bias is None or uses[step.inputs[one]] != 1 or len(product.inputs) != 2:
                    continue
                weight = self.constants.get(product.inputs[1])
                if weight is not None and _is_bias(product.op, weight.array, bias.array):
                    flat = Host(bias.array.reshape(-1), bias.name, bias.learned)
                    self.constants[f"{step.inputs[other]}/flat"] = flat
                    product.inputs = [*product.inputs, f"{step.inputs[other]}/flat"]
                    makers[step.outputs[0]] = product
                    product.outputs = list(step.outputs)
                    joined.append(step)
                    break
        self.steps = [step for step in self.steps if not any(step is each for each in joined)]

    def _drop_unused(self) -> None:
        needed, kept = set(self.outputs), []
        for step in reversed(self.steps):
            if needed & set(step.outputs):
                kept.append(step)
                needed |= set(step.inputs)
                for inner in _all([step]):
                    needed |= {*inner.inputs, *_branch_outputs(inner)}
        self.steps = kept[::-1]
        self.used = needed

    def _refuse_unknown(self, steps: list[Step]) -> None:
        for step in _all(steps):
            if step.op in _CONTROL:
                raise ModelError(
                    f"{self.file} cannot be imported: {step.label} repeats a graph, which a compressed model cannot "
                    "hold; export the model with its loop unrolled, or without this part"
                )
            if step.op not in HANDLERS and step.op != "If":
                raise ModelError(
                    f"{self.file} cannot be imported: {step.label} is not known to the importer; export the model "
                    "without it (often it belongs to what follows the network), or give its PyTorch code"
                )


def _all(steps: Iterable[Step]) -> Iterable[Step]:
    """The steps and those of their subgraphs."""
    for step in steps:
        yield step
        for value in step.attributes.values():
            if isinstance(value, Branch):
                yield from _all(value.steps)


def _branch_outputs(step: Step) -> list[str]:
    return [name for value in step.attributes.values() if isinstance(value, Branch) for name in value.outputs]


def _identities(branch: Branch, step: Step) -> list[Step]:
    return [
        Step("Identity", {}, [inner], [outer], f"{step.name}/{outer}", step.scopes, step.version)
        for inner, outer in zip(branch.outputs, step.outputs, strict=True)
    ]


def _scopes(scopes: str) -> tuple[str, ...]:
    try:
        return tuple(map(str, ast.literal_eval(scopes))) if scopes else ()
    except (ValueError, SyntaxError):
        return ()


def _constant(step: Step, file: str) -> np.ndarray:
    if len(step.attributes) == 1:
        ((kind, value),) = step.attributes.items()
        if kind == "value":
            return np.asarray(value)
        if kind in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
        if kind in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
    raise ModelError(f"{file} cannot be imported: {step.label} holds no dense numbers")


def _is_bias(op: str, weight: np.ndarray, bias: np.ndarray) -> bool:
    if bias.dtype != weight.dtype or weight.dtype.kind != "f":
        return False
    if op == "MatMul" and weight.ndim == 2:
        return bias.size == weight.shape[1] and (bias.ndim == 1 or (bias.ndim == 2 and bias.shape[0] == 1))
    if op == "Conv":
        ones = (weight.ndim - 2) * (1,)
        return bias.shape in ((weight.shape[0], *ones), (1, weight.shape[0], *ones))
    return False
