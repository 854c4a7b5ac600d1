"""Corruptions of an exported ONNX file, each as an exporter, a converter or a damaged tool might make it.

Each takes the file's protobuf and changes it in place; it returns False where the file has nothing for it to change.
What has no effect on any output is no fault, so each of them changes what it can reach and see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Fault = Callable[[Any], bool]


def _nodes(proto: Any, *kinds: str) -> list[Any]:
    return [node for node in proto.graph.node if node.op_type in kinds]


def _tensor(proto: Any, name: str) -> Any:
    return next((each for each in proto.graph.initializer if each.name == name), None)


def _change(proto: Any, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Gives one constant other numbers, of the same type."""
    tensor = _tensor(proto, name)
    if tensor is None:
        return False
    value = numpy_helper.to_array(tensor)
    changed = np.asarray(edit(value.copy()))
    if np.array_equal(changed, value):
        return False
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed.astype(value.dtype)), name))
    return True


def _apart(proto: Any, node: Any, place: int) -> str:
    """A constant of its own for one input of a node, so that no other node changes with it."""
    tensor = _tensor(proto, node.input[place])
    own = onnx.TensorProto()
    own.CopyFrom(tensor)
    own.name = f"{tensor.name}_of_{node.output[0]}"
    proto.graph.initializer.append(own)
    node.input[place] = own.name
    return own.name


def _attribute(node: Any, name: str) -> Any:
    return next((each for each in node.attribute if each.name == name), None)


def _without(proto: Any, node: Any) -> bool:
    """Drops an operator: what it read takes its place."""
    for other in proto.graph.node:
        other.input[:] = [node.input[0] if name == node.output[0] else name for name in other.input]
    proto.graph.node.remove(node)
    return True


def _weight_of(proto: Any, node: Any) -> str | None:
    """The constant behind the weight of a convolution or linear layer, through DequantizeLinear."""
    name = node.input[1]
    made = {out: each for each in proto.graph.node for out in each.output}
    while name in made and _tensor(proto, name) is None:
        name = made[name].input[0]
    return name if _tensor(proto, name) is not None else None


def _bias_of(proto: Any, node: Any) -> str | None:
    if len(node.input) < 3:
        return None
    made = {out: each for each in proto.graph.node for out in each.output}
    name = node.input[2]
    while name in made:
        name = made[name].input[0]
    return name if _tensor(proto, name) is not None else None


def _layers(proto: Any) -> Iterator[Any]:
    yield from _nodes(proto, "Conv", "Gemm")


def _on_weight(edit: Callable[[np.ndarray], np.ndarray], place: int = 1) -> Fault:
    def fault(proto: Any) -> bool:
        node = list(_layers(proto))[place]
        name = _weight_of(proto, node)
        return name is not None and _change(proto, name, edit)

    return fault


def _zero_channel(weight: np.ndarray) -> np.ndarray:
    weight[0] = 0
    return weight


def _saturate(weight: np.ndarray) -> np.ndarray:
    first = weight[0]
    first[...] = np.sign(first) * np.abs(weight).max()
    return weight


def _one_number(weight: np.ndarray) -> np.ndarray:
    flat = weight.reshape(-1)
    flat[np.argmax(np.abs(flat))] *= -1
    return weight


def drop_relu(proto: Any) -> bool:
    found = _nodes(proto, "Relu")
    return bool(found) and _without(proto, found[-1])


def add_relu(proto: Any) -> bool:
    """Behind the last layer."""
    node = next(each for each in proto.graph.node if proto.graph.output[0].name in each.output)
    node.output[0] = "before_relu"
    proto.graph.node.append(helper.make_node("Relu", ["before_relu"], [proto.graph.output[0].name]))
    return True


def swap_inputs(proto: Any) -> bool:
    """The two values of a concatenation the other way round."""
    for node in _nodes(proto, "Concat"):
        if len(node.input) == 2 and all(_tensor(proto, name) is None for name in node.input):
            node.input[:] = [node.input[1], node.input[0]]
            return True
    return False


def subtract_for_add(proto: Any) -> bool:
    found = [node for node in _nodes(proto, "Add") if all(_tensor(proto, name) is None for name in node.input)]
    if found:
        found[0].op_type = "Sub"
    return bool(found)


def add_itself(proto: Any) -> bool:
    """An addition reads one of its values twice."""
    found = [node for node in _nodes(proto, "Add") if all(_tensor(proto, name) is None for name in node.input)]
    if found:
        found[0].input[1] = found[0].input[0]
    return bool(found)


def no_bias(proto: Any) -> bool:
    node = list(_layers(proto))[1]
    name = _bias_of(proto, node)
    return name is not None and _change(proto, name, np.zeros_like)


def other_padding(proto: Any) -> bool:
    """One pixel to the right: as much padding in all, at the other side."""
    for node in _nodes(proto, "Conv"):
        pads = _attribute(node, "pads")
        if pads is not None and any(pads.ints):
            pads.ints[:] = [pads.ints[0] + 1, *pads.ints[1:2], pads.ints[2] - 1, *pads.ints[3:]]
            return True
    return False


def reflected_maximum(proto: Any) -> bool:
    """A maximum pool becomes an average pool of the same windows."""
    found = _nodes(proto, "MaxPool")
    if found:
        found[0].op_type = "AveragePool"
        for name in ("dilations", "storage_order"):
            if (each := _attribute(found[0], name)) is not None:
                found[0].attribute.remove(each)
    return bool(found)


def count_padding(proto: Any) -> bool:
    """An average pool forgets whether its padding counts."""
    found = [node for node in _nodes(proto, "AveragePool") if _attribute(node, "pads") is not None]
    if not found:
        return False
    each = _attribute(found[0], "count_include_pad")
    if each is None:
        found[0].attribute.append(helper.make_attribute("count_include_pad", 1))
    else:
        each.i = 1 - each.i
    return any(_attribute(found[0], "pads").ints)


def flat_in_another_order(proto: Any) -> bool:
    """A transpose in front of the reshape that flattens."""
    found = [node for node in _nodes(proto, "Reshape", "Flatten") if _tensor(proto, node.input[0]) is None]
    if not found:
        return False
    node = found[-1]
    index = list(proto.graph.node).index(node)
    turned = helper.make_node("Transpose", [node.input[0]], ["turned"], perm=[0, 1, 3, 2])
    node.input[0] = "turned"
    proto.graph.node.insert(index, turned)
    return True


def half_scale_of_weights(proto: Any) -> bool:
    """Of one layer: twice its scale, or its floats."""
    node = list(_layers(proto))[1]
    made = {out: each for each in proto.graph.node for out in each.output}
    if node.input[1] in made and made[node.input[1]].op_type == "DequantizeLinear":
        name = _apart(proto, made[node.input[1]], 1)
        return _change(proto, name, lambda scale: scale * 2)
    name = _weight_of(proto, node) or ""
    return _change(proto, name, lambda weight: weight * 2)


def fixed_batch(proto: Any) -> bool:
    """The file says that it takes one image, and a reshape does."""
    for node in _nodes(proto, "Reshape"):
        shape = _tensor(proto, node.input[1])
        if shape is not None and _tensor(proto, node.input[0]) is None:
            name = _apart(proto, node, 1)
            return _change(proto, name, lambda value: np.array([2, -1], np.int64))
    return False


def constant_of_the_batch(proto: Any) -> bool:
    """Something is added that was computed from the captured batch: another number per sample of two."""
    value = np.array([[0.5], [-0.5]], np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(value, "of_the_batch"))
    proto.graph.node.append(helper.make_node("Add", ["rest", "of_the_batch"], [proto.graph.output[0].name]))
    node = next(each for each in proto.graph.node if proto.graph.output[0].name in each.output)
    node.output[0] = "rest"
    return True


def swap_outputs(proto: Any) -> bool:
    if len(proto.graph.output) < 2:
        return False
    first, second = proto.graph.output[0].name, proto.graph.output[1].name
    names = {first: second, second: first}
    for node in proto.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        node.input[:] = [names.get(name, name) for name in node.input]
    return True


def constant_output(proto: Any) -> bool:
    """The result without its input."""
    node = next(each for each in proto.graph.node if proto.graph.output[0].name in each.output)
    node.output[0] = "rest"
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nothing"))
    proto.graph.node.append(helper.make_node("Mul", ["rest", "nothing"], [proto.graph.output[0].name]))
    return True


def clip_at_less(proto: Any) -> bool:
    """A clip ends at half of what it did; where there is none, one is put behind the first layer."""
    for node in _nodes(proto, "Clip"):
        if len(node.input) == 3 and _tensor(proto, node.input[2]) is not None:
            return _change(proto, _apart(proto, node, 2), lambda high: high / 2)
    node = next(_layers(proto))
    users = [each for each in proto.graph.node if node.output[0] in each.input]
    index = list(proto.graph.node).index(node)
    ends = [numpy_helper.from_array(np.array(v, np.float32), f"end_{v}") for v in (-0.2, 0.2)]
    proto.graph.initializer.extend(ends)
    proto.graph.node.insert(
        index + 1, helper.make_node("Clip", [node.output[0], ends[0].name, ends[1].name], ["clipped"])
    )
    for user in users:
        user.input[:] = ["clipped" if name == node.output[0] else name for name in user.input]
    return True


def grouped_otherwise(proto: Any) -> bool:
    """The inputs of a layer by another order of channels."""
    name = _weight_of(proto, list(_layers(proto))[1])
    return name is not None and _change(proto, name, lambda weight: np.roll(weight, 1, axis=1))


def _quantizer(edit: Callable[[Any, Any], bool], place: int = 1) -> Fault:
    def fault(proto: Any) -> bool:
        quantizers = _nodes(proto, "QuantizeLinear")
        if len(quantizers) <= place:
            return False
        node = quantizers[place]
        reader = next(each for each in _nodes(proto, "DequantizeLinear") if each.input[0] == node.output[0])
        return edit(proto, (node, reader))

    return fault


def _scale(factor: float, both: bool) -> Callable[[Any, Any], bool]:
    def edit(proto: Any, pair: Any) -> bool:
        return all(
            _change(proto, _apart(proto, node, 1), lambda scale: scale * factor)
            for node in (pair if both else pair[1:])
        )

    return edit


def _zero_point_off_by_one(proto: Any, pair: Any) -> bool:
    return _change(proto, _apart(proto, pair[1], 2), lambda zero: zero + (1 if zero < 255 else -1))


def _drop_pair(proto: Any, pair: Any) -> bool:
    for node in proto.graph.node:
        node.input[:] = [pair[0].input[0] if name == pair[1].output[0] else name for name in node.input]
    proto.graph.node.remove(pair[1])
    proto.graph.node.remove(pair[0])
    return True


# For any network.
FAULTS: dict[str, Fault] = {
    "relu dropped": drop_relu,
    "relu added": add_relu,
    "concatenation in another order": swap_inputs,
    "addition becomes subtraction": subtract_for_add,
    "addition of a value to itself": add_itself,
    "bias missing": no_bias,
    "padding on the other side": other_padding,
    "maximum becomes average": reflected_maximum,
    "padding counted otherwise": count_padding,
    "flattened in another order": flat_in_another_order,
    "weights twice as large": half_scale_of_weights,
    "weight turned": _on_weight(lambda weight: np.ascontiguousarray(np.flip(weight, -1))),
    "kernel transposed": _on_weight(lambda weight: np.swapaxes(weight, -1, -2) if weight.ndim == 4 else weight),
    "one output channel zero": _on_weight(_zero_channel),
    "one output channel saturated": _on_weight(_saturate),
    "sign of one weight": _on_weight(_one_number),
    "output channels in another order": _on_weight(lambda weight: np.roll(weight, 1, axis=0)),
    "input channels in another order": grouped_otherwise,
    "first layer negated": _on_weight(lambda weight: -weight, place=0),
    "reshape to a fixed batch": fixed_batch,
    "constant of the captured batch": constant_of_the_batch,
    "outputs swapped": swap_outputs,
    "output without its input": constant_output,
    "clip at less": clip_at_less,
}
# For int8 networks.
INT8_FAULTS: dict[str, Fault] = {
    "scale of a DequantizeLinear twice as large": _quantizer(_scale(2.0, both=False)),
    "scale of a DequantizeLinear 1 % larger": _quantizer(_scale(1.01, both=False)),
    "scale of a quantizer twice as large": _quantizer(_scale(2.0, both=True)),
    "zero point of a DequantizeLinear off by one": _quantizer(_zero_point_off_by_one),
    "quantizer dropped": _quantizer(_drop_pair),
}


def plant(data: bytes, fault: Fault) -> bytes | None:
    """A file with one fault; None where there is nothing in it that the fault can change."""
    proto = onnx.load_from_string(data)
    return proto.SerializeToString() if fault(proto) else None
