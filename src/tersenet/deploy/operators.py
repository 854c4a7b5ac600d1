"""The operators that the graph of a .terse file may call. Nothing else is looked up.

Arithmetic, shapes, convolutions, norms, pooling, attention: what image models need. Left out on purpose: whatever
touches files or random generators, reinterprets memory (as_strided, set_, resize_, view.dtype), or leaves it
uninitialised (empty).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

# Python's own, on sizes and lists of tensors.
PYTHON: dict[str, Callable[..., Any]] = {
    "operator.add": operator.add,
    "operator.floordiv": operator.floordiv,
    "operator.getitem": operator.getitem,
    "operator.mod": operator.mod,
    "operator.mul": operator.mul,
    "operator.neg": operator.neg,
    "operator.sub": operator.sub,
    "operator.truediv": operator.truediv,
    "torch.sym_float": torch.sym_float,
    "torch.sym_int": torch.sym_int,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
}

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
    )
}  # fmt: skip
MEMORY_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
}

_BINARY = "add sub mul div eq ne lt le gt ge remainder bitwise_and bitwise_or bitwise_xor"
_UNARY = """
abs bitwise_not ceil cos erf exp exp2 expm1 floor log log10 log1p log2 logical_not neg reciprocal round rsqrt
sigmoid sign sin sqrt square tan tanh trunc relu relu6 selu silu hardsigmoid hardswish mish log_sigmoid isnan isinf
acos acosh asin asinh atan atanh cosh sinh erfc erfinv digamma lgamma logit sgn signbit sinc angle deg2rad rad2deg i0
isneginf isposinf nan_to_num
"""
_IN_PLACE = """
abs_ exp_ neg_ relu_ relu6_ selu_ sigmoid_ silu_ hardsigmoid_ hardswish_ hardtanh_ mish_ tanh_ elu_ celu_
leaky_relu_ sqrt_ clamp_ clamp_min_ clamp_max_ squeeze_ unsqueeze_ dropout_ feature_dropout_ detach_ zero_
masked_fill_.Scalar add_.Tensor add_.Scalar sub_.Tensor sub_.Scalar mul_.Tensor mul_.Scalar div_.Tensor div_.Scalar
copy_
"""
_OTHERS = """
_adaptive_avg_pool2d _log_softmax _native_batch_norm_legit_no_training _softmax _to_copy _unsafe_view
_upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec
_upsample_nearest_exact3d.vec adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d add.Scalar addbmm addcdiv addcmul addmm addmv addr affine_grid_generator alias
all all.dim alpha_dropout amax amin aminmax any any.dim arange arange.start arange.start_step argmax argmin argsort
argsort.stable atan2 avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear block_diag bmm broadcast_tensors
bucketize.Tensor cat cdist celu channel_shuffle chunk clamp clamp.Tensor clamp_.Tensor clamp_max clamp_max.Tensor
clamp_min clamp_min.Tensor clone col2im concat constant_pad_nd contiguous conv1d conv1d.padding conv2d conv2d.padding
conv3d conv3d.padding conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution copy copysign.Scalar
copysign.Tensor count_nonzero count_nonzero.dim_IntList cross cummax cummin cumprod cumsum detach diag_embed diagonal
diagonal_copy diagonal_scatter dist div.Scalar div.Scalar_mode div.Tensor_mode dot dropout einsum elu embedding expand
expand_as eye eye.m feature_alpha_dropout feature_dropout fill.Scalar fill.Tensor flatten.using_ints flip floor_divide
fmax fmin fmod.Scalar fmod.Tensor frac full full_like gather gelu glu grid_sampler grid_sampler_2d grid_sampler_3d
group_norm gru.input hardshrink hardtanh heaviside hypot igamma igammac im2col index.Tensor index_add index_copy
index_fill.int_Scalar index_put index_select instance_norm isin.Tensor_Tensor kthvalue layer_norm ldexp.Tensor
leaky_relu lerp.Scalar lerp.Tensor lift_fresh lift_fresh_copy linalg_cross linalg_vector_norm linear log_softmax.int
logaddexp logaddexp2 logcumsumexp logical_and logical_or logical_xor logsumexp lstm.input mT masked_fill.Scalar
masked_fill.Tensor matmul max max.dim max.other max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d maximum mean mean.dim median median.dim min min.dim
min.other minimum mm mode movedim.int movedim.intlist mul.Scalar mv nanmedian nanmedian.dim nansum narrow narrow_copy
native_batch_norm native_channel_shuffle native_group_norm native_layer_norm new_full new_ones new_zeros nextafter
norm.Scalar norm.ScalarOpt_dim numel ones ones_like pad permute pixel_shuffle pixel_unshuffle pow.Scalar
pow.Tensor_Scalar pow.Tensor_Tensor prelu prod prod.dim_int reflection_pad1d reflection_pad2d reflection_pad3d
remainder.Scalar_Tensor renorm repeat repeat_interleave.self_int replication_pad1d replication_pad2d replication_pad3d
reshape reshape_as rms_norm rnn_relu.input rnn_tanh.input roll rot90 rrelu rsub.Scalar rsub.Tensor scalar_tensor
scaled_dot_product_attention scatter.src scatter.value scatter_add scatter_reduce.two searchsorted.Tensor select.int
select_scatter slice.Tensor slice_scatter softmax.int softplus softshrink sort sort.stable split.Tensor split.sizes
split_with_sizes squeeze squeeze.dim squeeze.dims stack std.correction std.dim std_mean.correction std_mean.dim
sub.Scalar sum sum.dim_IntList sym_numel sym_size.int t take threshold tile to.device to.dtype to.dtype_layout topk
trace transpose.int tril triu type_as unbind.int unflatten.int unfold unsafe_split.Tensor unsafe_split_with_sizes
unsqueeze upsample_bicubic2d upsample_bicubic2d.vec upsample_bilinear2d upsample_bilinear2d.vec upsample_linear1d.vec
upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec upsample_nearest3d.vec upsample_trilinear3d.vec
var.correction var.dim var_mean.correction var_mean.dim view view_as where.Scalar where.ScalarOther where.ScalarSelf
where.self xlogy.Scalar_Other xlogy.Scalar_Self xlogy.Tensor zeros zeros_like
"""


def _names(words: str) -> set[str]:
    """`relu` -> `aten.relu.default`; a dot says the overload."""
    return {f"aten.{word}" if "." in word else f"aten.{word}.default" for word in words.split()}


ATEN = frozenset(
    _names(_UNARY)
    | _names(_IN_PLACE)
    | _names(_OTHERS)
    | {f"aten.{word}.{overload}" for word in _BINARY.split() for overload in ("Tensor", "Scalar")}
)
