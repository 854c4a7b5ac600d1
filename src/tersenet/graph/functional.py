"""Exported programs without writes and without contexts: every operator gives a new tensor.

torch.export keeps what a forward does in place (`y[:, :2] = 0`, `relu_`) as operators that change their input. Whoever
takes operators out of a graph, moves them or puts others between them may only do so where nothing is changed behind
their back. torch's own decomposition with an empty table makes a program functional and keeps its operators; it takes
twice the time of the capture, so it is only done where it matters: a write into a tensor that nobody reads afterwards
under its old name is functional as it stands.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.node import map_arg

from tersenet.graph.composites import take_apart, without_in_place

aten = torch.ops.aten
_ORDERS = torch.ops.higher_order
# Operators that torch makes of others, and which never give back their input itself.
_FRESH = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "batch_norm",
    "layer_norm", "group_norm", "instance_norm", "rms_norm", "matmul", "softmax", "log_softmax", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "max_pool1d", "max_pool2d", "max_pool3d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "scaled_dot_product_attention", "pixel_shuffle",
}  # fmt: skip


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program with its contexts (no_grad, autocast) inlined, and without writes that matter.

    Under an autocast that is enabled the program says each change of type; elsewhere the operators stay as they are.
    """
    _inline(program.graph_module)
    program = take_apart(program)
    graph = program.graph_module
    _norms_again(graph.graph)
    if not (_contexts(graph) or _overwrites(graph.graph)):
        without_in_place(graph.graph)
        graph.recompile()
        return program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own parts
        program = program.run_decompositions({})
    graph = program.graph_module
    _inline(graph)
    _norms_again(graph.graph)
    _drop_copies(graph.graph)
    graph.recompile()
    return program


def writes(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            map_arg(value, found.append)
    return found


def _fills_another(node: fx.Node) -> bool:
    """Whether an operator writes what it computes into a tensor that it is only given for that (`out=`)."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(argument.is_out for argument in schema.arguments)


def _overwrites(graph: fx.Graph) -> bool:
    """Whether a write can be seen elsewhere than in what the operator returns."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if _fills_another(node):
            return True
        for changed in writes(node):
            shared = changed.op == "placeholder" or (_may_alias(changed) and not writes(changed))
            if shared or any(
                place[user] > place[node] or (user is not node and _may_alias(user)) for user in changed.users
            ):
                return True
    return False


def _may_alias(node: fx.Node) -> bool:
    """Whether what a node gives may share its memory with what it got."""
    if node.op != "call_function":
        return node.op != "output"
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    if any(value.alias_info is not None for value in node.target._schema.returns):
        return True
    composed = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return composed and node.target._opname not in _FRESH


# --- contexts ----------------------------------------------------------------------------------------------------


def _contexts(graph: fx.GraphModule) -> list[fx.Node]:
    """The calls of graphs inside of a context that changes what is computed."""
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target is _ORDERS.wrap_with_autocast and not _is_inert(node)
    ]


def _is_inert(node: fx.Node) -> bool:
    """Whether a context changes nothing of what is computed: gradients, or an autocast that is off or elsewhere."""
    if node.target is _ORDERS.wrap_with_set_grad_enabled:
        return True
    if node.target is not _ORDERS.wrap_with_autocast:
        return False
    device, _, enabled = node.args[:3]
    values = [source.meta.get("val") for source in node.all_input_nodes]
    return not enabled or all(value.device.type != device for value in values if isinstance(value, torch.Tensor))


def _inline(graph: fx.GraphModule) -> None:
    """Puts the operators of inert contexts in their place."""
    found = [node for node in graph.graph.nodes if node.op == "call_function" and _is_inert(node)]
    for node in found:
        _inline_one(graph, node)
    if found:
        graph.graph.eliminate_dead_code(lambda node: node.op != "get_attr")
        graph.recompile()
        if any(node.op == "call_function" and _is_inert(node) for node in graph.graph.nodes):
            _inline(graph)  # contexts inside of contexts


def _inline_one(graph: fx.GraphModule, node: fx.Node) -> None:
    place = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    inner: Any = getattr(graph, str(node.args[place].target))  # type: ignore[union-attr]
    known: dict[fx.Node, Any] = {}
    inputs = iter(node.args[place + 1 :])
    outputs: Any = ()
    with graph.graph.inserting_before(node):
        for own in inner.graph.nodes:
            if own.op == "placeholder":
                known[own] = next(inputs)
            elif own.op == "output":
                outputs = map_arg(own.args[0], lambda n: known[n])
            else:
                if own.op == "get_attr":
                    name = f"{node.args[place].target}_{own.target}".replace(".", "_")  # type: ignore[union-attr]
                    setattr(graph, name, getattr(inner, own.target))
                    known[own] = graph.graph.get_attr(name)
                else:
                    known[own] = graph.graph.node_copy(own, lambda n: known[n])
                known[own].meta = dict(own.meta)
    for user in list(node.users):
        assert user.target is operator.getitem, "a context gives a tuple"
        user.replace_all_uses_with(outputs[user.args[1]])
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


# --- what the decomposition took apart ---------------------------------------------------------------------------


def _norms_again(graph: fx.Graph) -> None:
    """The evaluating batch norm, which is not functional by its name, becomes one operator again."""
    for node in list(graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
            continue
        source, weight, bias, mean, variance, momentum, eps = node.args
        for user in list(node.users):
            with graph.inserting_before(user):
                arguments = (source, weight, bias, mean, variance, False, momentum, eps, False)
                new = graph.call_function(aten.batch_norm.default, arguments)
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)


def _drop_copies(graph: fx.Graph) -> None:
    """Nothing is written any more, so that copies for writing and detached views are the tensors themselves."""
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.copy.default and _alike(node, node.args[1]):
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)


def _alike(node: fx.Node, source: fx.Node) -> bool:
    """Whether all of a tensor is written over by one of the same shape and type."""
    whole, part = node.meta["val"], source.meta["val"]
    return str(whole.shape) == str(part.shape) and whole.dtype == part.dtype
