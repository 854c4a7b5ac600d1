"""Runs the steps of an ONNX file on torch's layers and functions.

The forward is plain Python over the list of operators: what is computed from tensors becomes torch calls, what is
known (constants, sizes) stays on the host. So torch.export captures it as it captures any model: with sizes that hang
on the batch alone, and layers under their paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from tersenet.errors import ModelError, TersenetError
from tersenet.onnx_import import operators, reference
from tersenet.onnx_import.call import Branch, Call, Step, parameter
from tersenet.onnx_import.names import Names
from tersenet.onnx_import.registry import HANDLERS
from tersenet.onnx_import.sizes import SIZES
from tersenet.onnx_import.steps import Steps
from tersenet.onnx_import.values import Host, as_tensor, settled

_FIRST = "channels first"  # the first input as it comes


class Network(nn.Module):
    """The network of an ONNX file.

    Its first call makes the layers, which depend on the sizes of the inputs where the file pads to "the same size".

    Args:
        proto: the ModelProto, without functions of its own.
        file: its name, for errors.
        channels_last: whether its first input is (N, H, W, C) in the file; here it is (N, C, H, W).
    Raises:
        ModelError: on an operator that is not known.
    """

    recorded: dict[str, tuple[int, ...]]  # shapes with the file's own batch, where that is fixed

    def __init__(self, proto: Any, file: str, channels_last: bool = False) -> None:
        super().__init__()
        assert operators.FAMILIES  # they fill the table of operators
        read = Steps(proto, file)
        self.file, self.steps, self.used, self.outputs = file, read.steps, read.used, read.outputs
        held = {tensor.name for tensor in proto.graph.initializer}
        self.inputs_by_order = [value.name for value in proto.graph.input if value.name not in held]
        self.constants = read.constants
        self.channels_last = channels_last
        self._shared = read.shared
        self.digest = hashlib.sha256(proto.graph.SerializeToString() + bytes([channels_last])).hexdigest()
        self.recorded = {}
        self._recording = False
        self._names = Names()
        self._paths: dict[Any, str] = {}
        self._arrays: dict[str, np.ndarray] = {}
        if channels_last:
            self._take_channels_first()
        self._last = self._last_uses()
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        """All outputs: the only one, or a dict by their names in the file."""
        values = self.run(inputs)
        outputs = {name: self._output(values[name], name) for name in self.outputs}
        return outputs[self.outputs[0]] if len(outputs) == 1 else outputs

    def record(self, inputs: Sequence[Tensor]) -> None:
        """Runs with the batch that the file fixes, and keeps the shape of each value."""
        self._recording = True
        try:
            self.run(inputs, keep=False)
        finally:
            self._recording = False

    def run(self, inputs: Sequence[Tensor], keep: bool = False) -> dict[str, Any]:
        """The outputs by name; with `keep` every value.

        Raises:
            ModelError: when an operator cannot be computed; names it.
        """
        values: dict[str, Any] = dict(zip(self.inputs_by_order, inputs, strict=True))
        if self.channels_last:
            first = self.inputs_by_order[0]
            values |= {first: inputs[0].permute(0, 2, 3, 1), _FIRST: inputs[0]}
        if self._recording:
            self.recorded |= {name: tuple(x.shape) for name, x in values.items()}
        for index, step in enumerate(self.steps):
            self._do(step, values)
            if not keep:
                for name in self._last[index]:
                    values.pop(name, None)
        return {**{name: self.constants[name] for name in self.outputs if name in self.constants}, **values}

    def _take_channels_first(self) -> None:
        """What the file turns to (N, C, H, W) itself is taken as it comes."""
        for step in self.steps:
            turns = step.op == "Transpose" and list(step.attributes.get("perm", ())) == [0, 3, 1, 2]
            if turns and step.inputs == self.inputs_by_order[:1]:
                step.op, step.attributes, step.inputs = "Identity", {}, [_FIRST]

    def _last_uses(self) -> list[list[str]]:
        """By step, the values that no later step reads."""
        seen, last = set(self.outputs), []
        for step in reversed(self.steps):
            read = {*step.inputs, *(name for value in step.attributes.values() if isinstance(value, Branch)
                                    for name in _read_by(value))}  # fmt: skip
            last.append([name for name in read - seen if name not in self.constants])
            seen |= read
        return last[::-1]

    def _do(self, step: Step, values: dict[str, Any]) -> None:
        given = [None if not name else self._value(name, values) for name in step.inputs]
        call = Call(self, step, given)
        results = self._branch(call, values) if step.op == "If" else self._computed(call)
        for name, value in zip(step.outputs, results if isinstance(results, tuple) else (results,), strict=False):
            values[name] = value
            if self._recording and isinstance(value, Tensor):
                self.recorded[name] = tuple(value.shape)

    def _value(self, name: str, values: dict[str, Any]) -> Any:
        return values[name] if name in values else self.constants[name]

    def _branch(self, call: Call, values: dict[str, Any]) -> tuple[Any, ...]:
        taken = bool(np.all(call.host(0, "condition")))
        branch = call.attribute("then_branch" if taken else "else_branch")
        for step in branch.steps:
            self._do(step, values)
        return tuple(self._value(name, values) for name in branch.outputs)

    def _computed(self, call: Call) -> Any:
        step = call.step
        given = [value for value in call.values if value is not None]
        try:
            if given and all(isinstance(value, Host) for value in given):
                return self._known(call, [value for value in given if isinstance(value, Host)])
            results = HANDLERS[step.op](call)
        except TersenetError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            if "GuardOnDataDependent" in type(error).__name__:
                raise
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            shapes = ", ".join("x".join(map(str, x.shape)) or "a number" for x in given if isinstance(x, Tensor))
            raise ModelError(
                f"{self.file} cannot be imported: {step.label} fails on inputs of {shapes}: {line}"
            ) from error
        unread = sorted(set(step.attributes) - step.read)
        if unread:
            call.refuse(f"has the attribute {unread[0]}={step.attributes[unread[0]]!r}, which is not known")
        return results

    def _known(self, call: Call, given: list[Host]) -> Any:
        """What follows from sizes and constants, on the host; as a tensor where it hangs on an open size."""
        step = call.step
        if any(value.symbolic for value in given):
            if step.op not in SIZES:
                return HANDLERS[step.op](call)
            results = SIZES[step.op](call)
        else:
            try:
                results = tuple(self._by_reference(step, [value.array for value in given]))
            except Exception:  # noqa: BLE001 - the reference raises many kinds
                return HANDLERS[step.op](call)
        several = results if isinstance(results, tuple) else (results,)
        return tuple(
            Host(settled(each), name) if isinstance(each, np.ndarray) else each
            for each, name in zip(several, step.outputs, strict=False)
        )

    def _by_reference(self, step: Step, arrays: list[np.ndarray]) -> list[np.ndarray]:
        from onnx import helper, numpy_helper

        attributes = {
            name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
            for name, value in step.attributes.items()
        }
        node = helper.make_node(step.op, step.inputs, step.outputs, **attributes)
        return reference.compute(node, step.version, arrays)

    def constant(self, step: Step, value: Host) -> Tensor:
        """A constant as a parameter or buffer of the network; one that hangs on the batch as a tensor of its own."""
        if value.symbolic:
            return as_tensor(value.array)
        key: Any = ("constant", value.name, id(value.array) if value.name in self.constants else 0)
        if value.learned and not _tells_apart(value):
            key = (*key, step.outputs[0])
        path = self._paths.get(key)
        if path is None:
            path = self._paths[key] = self._names.of_constant(step, value.name)
            self._arrays[path] = value.array
            tensor = parameter(value.array) if value.learned else as_tensor(value.array)
            owner, _, leaf = path.rpartition(".")
            if isinstance(tensor, nn.Parameter):
                self._owner(owner).register_parameter(leaf, tensor)
            else:
                self._owner(owner).register_buffer(leaf, tensor)
        held = getattr(self.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
        if not value.learned and value.name not in self.constants:  # made of sizes, which may be others now
            return held if np.array_equal(self._arrays[path], value.array) else as_tensor(value.array)
        return held

    def layer(self, step: Step, make: Callable[[], nn.Module], constants: Sequence[Host]) -> nn.Module:
        """The layer of a node; `make` is called at first."""
        path = self._paths.get(id(step))
        if path is None:
            module = make().eval()
            key = (type(module).__name__, module.extra_repr(), *(each.name or id(each) for each in constants))
            path = self._paths.get(key) if _tells_apart(constants[0]) else None
            if path is None:
                path = self._names.of_layer(step, [each.name for each in constants], self._shared)
                owner, _, leaf = path.rpartition(".")
                self._owner(owner).add_module(leaf, module)
                self._paths[key] = path
            self._paths[id(step)] = path
        return self.get_submodule(path)

    def _owner(self, path: str) -> nn.Module:
        owner: nn.Module = self
        for leaf in path.split(".") if path else ():
            if leaf not in owner._modules:
                owner.add_module(leaf, nn.Module())
            owner = owner._modules[leaf]  # type: ignore[assignment]
        return owner

    def _output(self, value: Any, name: str) -> Tensor:
        if isinstance(value, Host):
            return as_tensor(value.array)
        if not isinstance(value, Tensor):
            raise ModelError(f"{self.file} cannot be imported: its output {name!r} is no tensor")
        return value


def _tells_apart(value: Host) -> bool:
    """Whether numbers are those of one layer: exporters also keep one of equal numbers, such as the scales of 1 of all
    batch norms before a training, and these are no shared layer."""
    return bool((value.array != value.array.reshape(-1)[:1]).any())


def _read_by(branch: Branch) -> set[str]:
    names = set(branch.outputs)
    for step in branch.steps:
        names |= set(step.inputs)
        for value in step.attributes.values():
            if isinstance(value, Branch):
                names |= _read_by(value)
    return names
