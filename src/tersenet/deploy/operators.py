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
_adaptive_avg_pool2d _native_batch_norm_legit_no_training _softmax _log_softmax _to_copy _unsafe_view
bilinear copy diagonal_scatter fill.Scalar fill.Tensor index_put mT select_scatter slice_scatter
lstm.input gru.input rnn_tanh.input rnn_relu.input
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d add.Scalar
addmm alias all all.dim alpha_dropout amax amin any any.dim arange arange.start arange.start_step argmax argmin
atan2 avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bmm broadcast_tensors cat cdist celu chunk clamp
clamp.Tensor clamp_max clamp_min clone concat constant_pad_nd contiguous conv1d conv1d.padding conv2d
conv2d.padding conv3d conv3d.padding conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution
cross cumsum detach diagonal div.Scalar div.Scalar_mode div.Tensor_mode dot dropout einsum elu embedding expand
expand_as feature_dropout flatten.using_ints flip floor_divide frac full full_like gather gelu glu grid_sampler
group_norm hardshrink hardtanh im2col index.Tensor index_select instance_norm layer_norm leaky_relu lerp.Scalar
lerp.Tensor lift_fresh lift_fresh_copy linalg_vector_norm linear log_softmax.int logical_and logical_or logsumexp
masked_fill.Scalar masked_fill.Tensor matmul max max.dim max.other max_pool1d max_pool2d max_pool2d_with_indices
max_pool3d maximum mean mean.dim min min.dim min.other minimum mm movedim.int movedim.intlist mul.Scalar mv narrow
native_batch_norm native_group_norm native_layer_norm new_full new_ones new_zeros norm.ScalarOpt_dim norm.Scalar
numel ones ones_like pad permute pixel_shuffle pixel_unshuffle pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu
prod prod.dim_int reflection_pad1d reflection_pad2d repeat repeat_interleave.self_int replication_pad1d
replication_pad2d reshape reshape_as rms_norm roll rsub.Scalar rsub.Tensor scalar_tensor
scaled_dot_product_attention select.int slice.Tensor softmax.int softplus softshrink split.Tensor split.sizes
split_with_sizes squeeze squeeze.dim squeeze.dims stack std.correction std.dim sub.Scalar sum sum.dim_IntList
sym_numel sym_size.int t threshold tile to.device to.dtype to.dtype_layout topk transpose.int tril triu type_as
unbind.int unflatten.int unfold unsqueeze upsample_bicubic2d upsample_bicubic2d.vec upsample_bilinear2d
upsample_bilinear2d.vec upsample_linear1d.vec upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec
upsample_trilinear3d.vec var.correction var.dim var_mean.correction view view_as where.Scalar where.ScalarOther
where.ScalarSelf where.self zeros zeros_like
_upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec
_upsample_nearest_exact3d.vec adaptive_max_pool3d addbmm addmv block_diag diagonal_copy eye eye.m igamma igammac
narrow_copy nextafter rrelu std_mean.dim var_mean.dim addcdiv addcmul addr affine_grid_generator aminmax argsort
argsort.stable bucketize.Tensor channel_shuffle clamp_max.Tensor clamp_min.Tensor col2im copysign.Scalar
copysign.Tensor count_nonzero count_nonzero.dim_IntList cummax cummin cumprod diag_embed dist feature_alpha_dropout
fmax fmin fmod.Scalar fmod.Tensor grid_sampler_2d grid_sampler_3d heaviside hypot index_add index_copy
index_fill.int_Scalar isin.Tensor_Tensor kthvalue ldexp.Tensor linalg_cross logaddexp logaddexp2 logcumsumexp
logical_xor max_pool1d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d median median.dim mode
native_channel_shuffle nanmedian nanmedian.dim nansum reflection_pad3d renorm replication_pad3d rot90 scatter.src
scatter.value scatter_add scatter_reduce.two searchsorted.Tensor sort sort.stable std_mean.correction take trace
unsafe_split.Tensor unsafe_split_with_sizes upsample_nearest3d.vec xlogy.Scalar_Other xlogy.Scalar_Self xlogy.Tensor
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
