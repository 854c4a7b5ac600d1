"""Operators under other names: composites are taken apart, and in-place forms become the plain ones.

PyTorch has many operators that only call others: `divide` is `div`, `hstack` is `cat`, `cosine_similarity` is sums and
products. Whoever follows channels, writes files or quantizes knows the operators that they are made of. Composites
that other parts of tersenet know as they are (a convolution, a softmax) stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._export.utils import _get_decomp_for_cia
from torch.export import ExportedProgram

from tersenet.graph.open_batch import is_open

aten = torch.ops.aten
_COMPOSITE = "CompositeImplicitAutograd"
_ROUNDS = 4  # composites of composites

# Composites that are known as they are: to the following of channels, to .terse files, to the ONNX exporter.
_KEPT_WORDS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d alpha_dropout avg_pool1d batch_norm
bilinear broadcast_tensors cdist channel_shuffle chunk concat contiguous conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d cross dropout einsum expand_as feature_alpha_dropout feature_dropout flatten
grid_sampler group_norm gru instance_norm layer_norm linear log_sigmoid log_softmax lstm mT matmul max max_pool1d
max_pool1d_with_indices max_pool2d max_pool3d min movedim nanquantile narrow native_batch_norm numel pad prelu
quantile relu6 repeat_interleave reshape reshape_as rms_norm rnn_relu rnn_tanh rrelu scaled_dot_product_attention selu
softmax split square std std_mean stft sym_numel sym_size tile to type_as unflatten unsafe_chunk var var_mean view_as
where
"""
# In-place forms that are known as they are.
_KEPT_IN_PLACE_WORDS = """
abs_ exp_ neg_ relu_ relu6_ selu_ sigmoid_ silu_ hardsigmoid_ hardswish_ hardtanh_ mish_ tanh_ elu_ celu_ leaky_relu_
sqrt_ clamp_ clamp_min_ clamp_max_ squeeze_ unsqueeze_ dropout_ feature_dropout_ detach_ zero_ masked_fill_ add_ sub_
mul_ div_ copy_
"""
_KEPT, _KEPT_IN_PLACE = (frozenset(words.split()) for words in (_KEPT_WORDS, _KEPT_IN_PLACE_WORDS))


def is_composite(target: Any) -> bool:
    """Whether an operator only calls others, and is not known as it is."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    # Resizing is known by its name; and of what works on complex numbers the parts are known no better.
    if target._opname.rstrip("_") in _KEPT or "upsample" in target._opname or target._opname.startswith("fft_"):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), _COMPOSITE)


def take_apart(program: ExportedProgram) -> ExportedProgram:
    """The program without composites that are not known as they are; as it was where torch cannot take them apart, or
    only for one size of batch.
    """
    for _ in range(_ROUNDS):
        found = {node.target for node in program.graph.nodes if is_composite(node.target)}
        if not found:
            return program
        table: dict[Any, Callable[..., Any]] = {target: _get_decomp_for_cia(target) for target in found}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about its own parts
                new = program.run_decompositions(table)
        except Exception:  # noqa: BLE001 - torch's decomposition raises many kinds; the composite is right as it stands
            return program
        if is_open(program) and not is_open(new):
            return program
        if len(new.graph_signature.input_specs) > len(program.graph_signature.input_specs):
            return program  # what raises errors by itself, such as an inverse, is chained by a further input
        program = new
    return program


def without_in_place(graph: fx.Graph) -> None:
    """Of a functional graph, in which nobody reads a tensor that was written into: in-place forms become plain ones."""
    for node in list(graph.nodes):
        plain = _plain(node.target) if node.op == "call_function" else None
        if plain is None:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        with node.meta["val"].fake_mode:
            value = plain(*args, **kwargs)
        if value.dtype == node.meta["val"].dtype:
            node.target = plain
            continue
        with graph.inserting_before(node):  # such as a comparison, which in place keeps the type of its input
            computed = graph.call_function(plain, node.args, node.kwargs)
        computed.meta = {**node.meta, "val": value}
        node.target, node.args, node.kwargs = aten.to.dtype, (computed, node.meta["val"].dtype), {}


def _plain(target: Any) -> Any:
    """`aten.atan.default` for `aten.atan_.default`; None for others, and for those that are known as they are."""
    name = getattr(target, "_opname", "")
    if not name.endswith("_") or name.startswith("_") or name in _KEPT_IN_PLACE or target.namespace != "aten":
        return None
    packet = getattr(aten, name[:-1], None)
    overloads = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return next((each for each in overloads if _arguments(each) == _arguments(target)), None)


def _arguments(target: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]
