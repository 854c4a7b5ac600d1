# ruff: noqa: E501
"""Which settings of which operators are tried, and which operators cannot stand in a network, with the reason.

One line is "names @source: setting | setting". A setting of a function is what stands behind its first argument, or
with "=" the whole expression; of a layer it is what its constructor takes, and behind "=>" the expression that calls
it. In expressions `f` is the function or layer, `x` channels from a layer before, `y` channels from another layer
beside it, `u` x within (0, 1), `p(name, *shape)` a parameter of the network itself. Sources: image (2, 8, 6, 6),
sequence (2, 8, 6), volume (2, 8, 4, 4, 4), tokens (2, 6, 8), rows (2, 8); without one, the digit in the name says it.
Names without a line are called with `x` alone, then with `x, y`.
"""

from __future__ import annotations

LAYERS = """
Conv1d Conv2d Conv3d: 8, 6, 3 | 8, 6, 3, stride=2, padding=1, bias=False | 8, 6, 3, padding="same", dilation=2
Conv1d Conv2d: 8, 6, 3, padding=1, padding_mode="reflect" | 8, 8, 3, groups=8 | 8, 6, 3, groups=2 | 8, 16, 3, groups=8 | 8, 6, 3, padding=1, padding_mode="circular"
ConvTranspose1d ConvTranspose2d ConvTranspose3d: 8, 6, 3 | 8, 6, 2, stride=2 | 8, 6, 3, stride=2, padding=1, output_padding=1
ConvTranspose1d ConvTranspose2d: 8, 6, 3, groups=2 | 8, 8, 3, groups=8 | 8, 6, 3, dilation=2, bias=False
ConvTranspose2d: 8, 6, 3, stride=2 => f(x, output_size=[14, 14])
Linear @tokens: 8, 6 | 8, 6, bias=False
Linear @image: 6, 4
Bilinear @rows: 8, 8, 6 => f(x, y)
Embedding @tokens: 6, 8 => x + f(torch.arange(6)) | 6, 8, max_norm=1.0 => x + f(torch.arange(6))
EmbeddingBag @rows: 6, 8 => x + f(torch.arange(6)[None])
BatchNorm1d BatchNorm2d BatchNorm3d: 8 | 8, eps=1e-3, affine=False | 8, track_running_stats=False
BatchNorm1d SyncBatchNorm @rows: 8
InstanceNorm1d InstanceNorm2d InstanceNorm3d: 8 | 8, affine=True | 8, affine=True, track_running_stats=True
GroupNorm: 4, 8 | 1, 8 | 8, 8 | 2, 8, affine=False
LayerNorm @tokens: 8 | 8, elementwise_affine=False | 8, bias=False | (6, 8)
LayerNorm @image: (8, 6, 6) | 6
RMSNorm @tokens: 8 | 8, elementwise_affine=False | 8, eps=1e-3
LocalResponseNorm CrossMapLRN2d: 3 | 5, alpha=0.1, beta=0.5, k=2.0
MultiheadAttention @tokens: 8, 2, batch_first=True => f(x, x, x)[0] | 8, 2, batch_first=True => f(x, y, y, need_weights=False)[0] | 8, 4, bias=False, batch_first=True => f(x, x, x)[0]
TransformerEncoderLayer @tokens: 8, 2, 16, batch_first=True | 8, 2, 16, batch_first=True, norm_first=True, activation="gelu"
TransformerEncoder @tokens: torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2
TransformerDecoderLayer @tokens: 8, 2, 16, batch_first=True => f(x, y)
TransformerDecoder @tokens: torch.nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2 => f(x, y)
Transformer @tokens: 8, 2, 1, 1, 16, batch_first=True => f(x, y)
LSTM GRU RNN @tokens: 8, 6, batch_first=True => f(x)[0] | 8, 6, 2, batch_first=True, bidirectional=True => f(x)[0] | 8, 6, batch_first=True => f(x)[0][:, -1]
GRUCell RNNCell @rows: 8, 6
LSTMCell @rows: 8, 6 => f(x)[0]
Fold @sequence: (4, 4), (2, 2), stride=(2, 1)
Unfold: 3, padding=1 | 2, stride=2
Flatten:  | 2 | 1, 2
Unflatten: 1, (4, 2) | 3, (2, 3)
PixelShuffle: 2
PixelUnshuffle: 2 | 3
ChannelShuffle: 2 | 4
Upsample: scale_factor=2 | scale_factor=2, mode="bilinear" | size=(9, 9), mode="bilinear", align_corners=True | scale_factor=1.5, mode="bicubic" | size=(4, 5), mode="nearest-exact"
Upsample @sequence: scale_factor=2, mode="linear"
Upsample @volume: scale_factor=2, mode="trilinear"
UpsamplingBilinear2d UpsamplingNearest2d: scale_factor=2
MaxPool1d MaxPool2d MaxPool3d: 2 | 3, stride=2, padding=1 | 2, stride=2, dilation=2, ceil_mode=True | 3, stride=2, ceil_mode=True
AvgPool1d AvgPool2d AvgPool3d: 2 | 3, stride=2, padding=1, count_include_pad=False | 3, stride=2, padding=1, ceil_mode=True
AvgPool2d AvgPool3d: 3, stride=1, padding=1, divisor_override=2
LPPool1d LPPool2d LPPool3d: 2, 2 | 1, 3, stride=1
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d: 1 | 2 | 3
AdaptiveAvgPool2d AdaptiveMaxPool2d: (None, 3) | 4
MaxUnpool1d: 2 => f(*F.max_pool1d(x, 2, return_indices=True))
MaxUnpool2d: 2 => f(*F.max_pool2d(x, 2, return_indices=True))
MaxUnpool3d: 2 => f(*F.max_pool3d(x, 2, return_indices=True))
ConstantPad1d ConstantPad2d ConstantPad3d: 1, 0.5 | 2, 0.0
ZeroPad1d ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d: 1
ZeroPad2d ReflectionPad2d ReplicationPad2d CircularPad2d: (1, 0, 2, 1)
PReLU:  | 8
Softmax Softmin LogSoftmax: 1 | -1
GLU: 1 | -1
Threshold: 0.1, 0.3
Hardtanh:  | -0.5, 0.7
Softplus:  | 2.0, 5.0
CELU ELU:  | 0.5
LeakyReLU: 0.2
GELU:  | approximate="tanh"
Softshrink Hardshrink: 0.3
CosineSimilarity: 1 => f(x, y).unsqueeze(1) | 1 => f(x, y)
PairwiseDistance @tokens: 2 => f(x, y)
"""

FUNCTIONS = """
add sub subtract true_divide truediv multiply mul rsub: y | 0.5 | p("b", 1, 8, 1, 1) | y.mean((2, 3), keepdim=True)
add sub subtract: y, alpha=0.5
radd rmul rpow rsub rmod: 1.5
rdiv: =f(u + 0.5, 1.5)
pow float_power: 2 | 3.0
float_power_: =f(x.double(), 2)
div divide: y.abs() + 1 | 2.0 | p("b", 1, 8, 1, 1).abs() + 1 | 2.0, rounding_mode="floor" | y.abs() + 1, rounding_mode="trunc"
floor_divide floordiv rfloordiv: 0.7
remainder fmod mod: 0.7 | y.abs() + 1
iadd isub imul: y | 0.5
idiv: 2.0
ifloordiv imod: 0.7
matmul: y.mT | p("w", 6, 4)
rmatmul: =x.mT.__rmatmul__(y)
getitem: =f(x, (slice(None), slice(2, None))) | =f(x, (slice(None), 3)) | =f(x, (Ellipsis, slice(None, None, 2))) | =f(x, (slice(None), [0, 2, 1])) | =f(x, (slice(None), None, 0)) | =f(x, (slice(None), slice(None, None, 2)))
setitem: =(x, f(x, (slice(None), slice(0, 2)), 0.0))[0] | =(x, f(x, (Ellipsis, 0), y[..., 0]))[0] | =(x, f(x, x < 0, 0.0))[0]
reversed: =f(x)
and or xor: =f(x > 0, y > 0)
iand ior ixor: =f(x > 0, y > 0)
__rand__ ror rxor: =f(x > 0, y > 0)
invert logical_not bitwise_not: =f(x > 0)
logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor: =f(x > 0, y > 0)
lshift rshift bitwise_left_shift bitwise_right_shift ilshift irshift rlshift rrshift: =f((x * 4).int(), 1)
gcd lcm: =f((x * 9).int(), (y * 9).int())
eq ne lt le gt ge greater greater_equal less less_equal not_equal: 0.1 | y
acos arccos asin arcsin atanh arctanh logit erfinv special_ndtri special_logit: =f(u * 0.9 + 0.05)
log log2 log10 log1p sqrt rsqrt reciprocal digamma lgamma special_entr special_digamma special_gammaln special_psi: =f(u + 0.5)
acosh arccosh: =f(u + 1.5)
mvlgamma special_multigammaln: =f(u + 2, 2)
special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v special_chebyshev_polynomial_w special_hermite_polynomial_h special_hermite_polynomial_he special_laguerre_polynomial_l special_legendre_polynomial_p special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w: 2
polygamma special_polygamma: =f(1, u + 0.5) if "special" in str(f) or hasattr(torch, "polygamma") and f is torch.polygamma else f(u + 0.5, 1)
addcmul: x, y, value=0.5 | y, p("w", 8, 1, 1)
addcdiv: x, y.abs() + 1, value=0.5
lerp: y, 0.3 | y, p("w", 8, 1, 1)
where: =torch.where(x > 0, x, y) | =torch.where(x > y, x, 0.0)
maximum minimum fmax fmin copysign hypot atan2 arctan2 nextafter logaddexp logaddexp2 heaviside: y
max min amax amin argmax argmin: 1 | (-1), keepdim=True
max min: y
amax amin: (2, 3)
clamp clip: -0.3, 0.4 | 0.0 | max=0.5 | y - 0.1, y + 0.1
clamp_min clamp_max: 0.1
threshold: 0.1, 0.2
xlogy special_xlogy special_xlog1py: u
ldexp: torch.tensor(2)
nan_to_num: 0.0
isclose: y
isin: =torch.isin(x.round(), torch.tensor([0.0, 1.0]))
bucketize: torch.tensor([-0.5, 0.0, 0.5])
searchsorted: =torch.searchsorted(torch.tensor([-0.5, 0.0, 0.5]), x)
igamma igammac special_gammainc special_gammaincc special_zeta: =f(u + 1.5, y.sigmoid() + 0.5)
sum mean: 1 | (2, 3) | -1, keepdim=True | 1, keepdim=True
nansum nanmean std var logsumexp special_logsumexp prod any all count_nonzero: 1 | -1
std var: (2, 3) | 1, keepdim=True, correction=0
std_mean var_mean aminmax: =f(x, dim=1) | =f(x, dim=-1)
std_mean var_mean: (2, 3)
median nanmedian mode cummax cummin cumsum cumprod logcumsumexp sort argsort msort_ diff_: 1 | -1
kthvalue: 2, 1 | 2, -1
topk: 3, 1 | 3, -1
quantile nanquantile: 0.5, dim=1 | 0.5, dim=-1
msort: =f(x.transpose(0, 1)).transpose(0, 1)
diff: dim=1 | dim=-1
trapz trapezoid cumulative_trapezoid: dim=1 | dim=-1
gradient: dim=2
norm: dim=1 | dim=(2, 3), keepdim=True | p=1, dim=-1 | p=float("inf"), dim=1
frobenius_norm: (2, 3)
renorm: 2, 1, 1.0
dist: =f(x, y).expand(x.shape[0], 1)
cdist @tokens: y | y, p=1.0
cosine_similarity: y, dim=1 | y, dim=-1
pairwise_distance @tokens: y
normalize: dim=1 | dim=-1 | p=1.0, dim=1
softmax log_softmax special_softmax special_log_softmax softmin: =f(x, dim=1) | =f(x, dim=-1)
glu: 1 | -1
celu elu leaky_relu: 0.3
leaky_relu_: 0.3
hardtanh: -0.5, 0.7
prelu: p("w", 8) | p("w", 1)
gelu:  | approximate="tanh"
softplus:  | 2.0
softshrink hardshrink: 0.3
dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout: =f(x, 0.5, False)
native_dropout: =f(x, 0.5, False)
flatten: 1 | 2 | 1, 2
ravel: =f(x[0]).expand(x.shape[0], 288)
unflatten: 1, (4, 2) | 3, (2, -1)
reshape view: =f(x, (x.shape[0], 8, 36)) | =f(x, (-1, 2, 4, 6, 6)) | =f(x, (x.shape[0], 4, -1))
view_as reshape_as: =f(x.flatten(2), y)
expand_as type_as: =f(x.mean((2, 3), keepdim=True), y)
expand broadcast_to: =f(x.mean(1, keepdim=True), (-1, 8, -1, -1) if f is torch.Tensor.expand else (x.shape[0], 8, 6, 6)) | =f(x.mean(3, keepdim=True), (x.shape[0], 8, 6, 6))
sum_to_size: =f(x, (x.shape[0], 8, 1, 1)) | =f(x, (x.shape[0], 1, 6, 6))
repeat: 1, 2, 1, 1 | 1, 1, 2, 1
tile: =f(x, (1, 2, 1, 1)) | =f(x, (2,))
repeat_interleave: 2, 1 | 2, -1
squeeze: =f(x.mean((2, 3), keepdim=True), -1) | =f(x[:, :, :1, :1])
unsqueeze: 1 | -1
permute: (0, 2, 3, 1) | (0, 1, 3, 2)
transpose swapaxes swapdims: 1, 2 | 2, 3
movedim moveaxis: 1, -1 | (1, 2), (2, 1)
t: =f(x.mean((2, 3)).reshape(-1, 8)).t()
T H: =f(x.mean((2, 3))).t()
adjoint mT mH: =f(x)
rot90: 1, (2, 3) | 1, (1, 2)
roll: 1, 1 | (1, 2), (2, 3) | 3
flip: (1,) | (2, 3)
fliplr: =f(x)
flipud: =f(x.transpose(0, 1)).transpose(0, 1)
narrow narrow_copy: 1, 2, 3 | 3, 1, 4
select: 1, 3 | 3, 1
index_select: 1, torch.tensor([0, 2, 1]) | 3, torch.tensor([0, 2])
take_along_dim: =f(x, (x > 0).long(), 1) | =f(x, (x > 0).long(), 3)
gather: =f(x, 1, (x > 0).long()) | =f(x, 3, (x > 0).long())
take: torch.arange(4)[None, :, None, None] + torch.zeros(2, 1, 1, 1, dtype=torch.long)
masked_fill: x > 0, 0.5
masked_fill_: x > 0, 0.5
masked_scatter masked_scatter_: x > 0, y
masked_select: =f(x, x > 0).sum().expand(x.shape[0], 1)
index_add index_copy: 1, torch.tensor([0, 2]), y[:, :2] | 3, torch.tensor([0, 2]), y[..., :2]
index_fill: 1, torch.tensor([0, 2]), 0.5 | 3, torch.tensor([0, 2]), 0.5
index_put: (torch.tensor([0]),), y[:1]
index_reduce: 3, torch.tensor([0, 2]), y[..., :2], "amax"
scatter scatter_add: 1, (x > 0).long(), y | 3, (x > 0).long(), y
scatter_reduce: 1, (x > 0).long(), y, "sum"
select_scatter: y[:, 0], 1, 3 | y[..., 0], 3, 1
slice_scatter: y[:, :2], 1, 0, 2 | y[..., :2], 3, 0, 2
diagonal_scatter: y.diagonal(0, 2, 3), 0, 2, 3
diagonal: 0, 2, 3 | 0, 1, 2
linalg_diagonal: dim1=2, dim2=3
diag_embed: =f(x.mean(3))
tril triu: =f(x) | =f(x.flatten(2).mT)
chunk unsafe_chunk tensor_split: 2, 1 | 2, 3
split unsafe_split: 4, 1 | 2, 3 | 3, 1
split_with_sizes unsafe_split_with_sizes: (2, 6), 1 | (2, 4), 3
hsplit dsplit vsplit: =f(x, 2) if "v" not in str(f) else f(x.transpose(0, 1), 2)[0].transpose(0, 1)
unbind: 1 | 2
cat concat concatenate: =f([x, y], 1) | =f([x, y], 2) | =f([x, x * 2, y[:, :3]], dim=1)
stack: =f([x, y], 1) | =f([x, y], -1)
hstack dstack column_stack: =f([x, y])
vstack row_stack: =f([x.transpose(0, 1), y.transpose(0, 1)]).transpose(0, 1)
meshgrid: =x + f(torch.arange(6.0), torch.arange(6.0), indexing="ij")[0]
broadcast_tensors: =f(x, y.mean((2, 3), keepdim=True))[1]
atleast_1d atleast_2d atleast_3d: =f(x)
block_diag: =f(x[0, 0], y[0, 0]).expand(x.shape[0], 12, 12)
cross linalg_cross: =f(x[:, :3], y[:, :3], dim=1)
tensordot: =f(x, p("w", 8, 5), ([1], [0]))
einsum: =f("nchw,ndhw->ncd", x, y) | =f("nchw,cd->ndhw", x, p("w", 8, 5)) | =f("bchw->bhwc", x) | =f("...hw,...hw->...", x, y)
bmm: =f(x.flatten(2), y.flatten(2).mT)
baddbmm_: =f(torch.zeros(x.shape[0], 8, 8), x.flatten(2), y.flatten(2).mT)
baddbmm: =f(torch.zeros(1), x.flatten(2), y.flatten(2).mT)
addbmm: =f(torch.zeros(1), x.flatten(2), y.flatten(2).mT).expand(x.shape[0], 8, 8)
mm: =f(x.mean((2, 3)), p("w", 8, 5))
addmm_: =f(torch.zeros(x.shape[0], 5), x.mean((2, 3)), p("w", 8, 5))
addmm: =f(p("b", 5), x.mean((2, 3)), p("w", 8, 5))
mv: =f(x.mean((2, 3)), p("w", 8))[:, None]
addmv: =f(torch.zeros(x.shape[0]), x.mean((2, 3)), p("w", 8))[:, None]
dot vdot: =f(x[0].flatten(), y[0].flatten()).expand(x.shape[0], 1)
inner: =f(x, p("w", 5, 6))
outer ger: =x + f(p("a", 6), p("b", 6))
addr: =x + f(torch.zeros(6, 6), p("a", 6), p("b", 6))
kron: =f(x, torch.ones(1, 1, 2, 2))
chain_matmul linalg_multi_dot: =f(x.mean((2, 3)), p("w", 8, 5), p("v", 5, 4)) if "chain" in str(f) else f([x.mean((2, 3)), p("w", 8, 5), p("v", 5, 4)])
linalg_matmul: y.mT
linalg_vecdot: y, dim=1 | y, dim=-1
linalg_vector_norm: dim=1 | dim=(2, 3) | ord=1, dim=-1
linalg_norm: dim=1 | dim=(2, 3)
linalg_matrix_norm: "fro", (2, 3)
linalg_matrix_power matrix_power: 2
linear: p("w", 5, 6), p("b", 5)
linear @tokens: p("w", 5, 8), p("b", 5) | p("w", 5, 8)
bilinear @tokens: y, p("w", 4, 8, 8), p("b", 4)
conv1d conv2d conv3d: p("w", 6, 8, *[3] * (x.dim() - 2)), p("b", 6) | p("w", 6, 8, *[3] * (x.dim() - 2)), stride=2, padding=1 | p("w", 8, 1, *[3] * (x.dim() - 2)), groups=8 | p("w", 6, 8, *[3] * (x.dim() - 2)), padding="same"
conv_transpose1d conv_transpose2d conv_transpose3d: p("w", 8, 6, *[3] * (x.dim() - 2)), p("b", 6) | p("w", 8, 6, *[2] * (x.dim() - 2)), stride=2
convolution: p("w", 6, 8, 3, 3), p("b", 6), [1, 1], [1, 1], [1, 1], False, [0, 0], 1
conv_tbc: =f(x.mean(3).permute(2, 0, 1).contiguous(), p("w", 3, 8, 6), p("b", 6)).permute(1, 2, 0)
batch_norm: p("m", 8), p("v", 8).exp(), p("w", 8), p("b", 8), False, 0.1, 1e-5, *([False] if f is torch.batch_norm else []) if f is not F.batch_norm else []
native_batch_norm: =f(x, p("w", 8), p("b", 8), p("m", 8), p("v", 8).exp(), False, 0.1, 1e-5)[0]
instance_norm: =f(x, *([None] * 4), True, 0.1, 1e-5, *([False] if f is torch.instance_norm else [])) | =f(x, None, None, p("w", 8), p("b", 8)) if f is F.instance_norm else f(x, p("w", 8), p("b", 8), None, None, True, 0.1, 1e-5, False)
layer_norm: (6,) | (8, 6, 6)
layer_norm @tokens: (8,), p("w", 8), p("b", 8)
native_layer_norm @tokens: =f(x, (8,), p("w", 8), p("b", 8), 1e-5)[0]
rms_norm @tokens: (8,), p("w", 8) | (8,)
group_norm: 4 | 2, p("w", 8), p("b", 8)
native_group_norm: =f(x, p("w", 8), p("b", 8), x.shape[0], 8, 36, 2, 1e-5)[0]
local_response_norm: 3
embedding @tokens: =x + f(torch.arange(6), p("w", 6, 8)) if f is F.embedding else x + f(p("w", 6, 8), torch.arange(6))
embedding_bag @rows: =x + F.embedding_bag(torch.arange(6)[None], p("w", 6, 8))
one_hot: =f((x > 0).long(), 2).float()
avg_pool1d avg_pool2d avg_pool3d: 2 | 3, 2, 1, count_include_pad=False | 3, 2, 1, ceil_mode=True
avg_pool2d avg_pool3d: 3, 1, 1, divisor_override=2
max_pool1d max_pool2d max_pool3d: 2 | 3, 2, 1 | 2, 2, dilation=2, ceil_mode=True | 3, 2, ceil_mode=True
max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices: 2
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices: 1 | 2 | 3
lp_pool1d lp_pool2d lp_pool3d: 2, 2 | 1, 3, 1
max_unpool1d: =f(*F.max_pool1d(x, 2, return_indices=True), 2)
max_unpool2d: =f(*F.max_pool2d(x, 2, return_indices=True), 2)
max_unpool3d: =f(*F.max_pool3d(x, 2, return_indices=True), 2)
interpolate: scale_factor=2 | scale_factor=2, mode="bilinear" | size=(9, 9), mode="bilinear", align_corners=True | size=(4, 4), mode="bilinear", antialias=True | scale_factor=1.5, mode="bicubic" | size=(3, 3), mode="area" | size=(4, 5), mode="nearest-exact"
upsample upsample_nearest upsample_bilinear: scale_factor=2
grid_sample: F.affine_grid(p("t", 1, 2, 3).expand(x.shape[0], 2, 3), list(x.shape), align_corners=False), align_corners=False | torch.stack([y[:, 0], y[:, 1]], -1).tanh(), mode="nearest", align_corners=True
grid_sampler grid_sampler_2d: F.affine_grid(p("t", 1, 2, 3).expand(x.shape[0], 2, 3), list(x.shape), align_corners=False), 0, 0, False
grid_sampler_3d: F.affine_grid(p("t", 1, 3, 4).expand(x.shape[0], 3, 4), list(x.shape), align_corners=False), 0, 0, False
affine_grid: =f(p("t", 1, 2, 3).expand(x.shape[0], 2, 3), list(x.shape), False) + x.mean()
affine_grid_generator: =f(p("t", 1, 2, 3).expand(x.shape[0], 2, 3), list(x.shape), False) + x.mean()
pad: (1, 1, 1, 1) | (1, 2), value=0.5 | (0, 0, 0, 0, 2, 1) | (1, 1, 1, 1), mode="reflect" | (1, 1, 1, 1), mode="replicate" | (1, 1, 1, 1), mode="circular" | (-1, 0, 1, 0)
constant_pad_nd: (1, 1), 0.5 | (0, 0, 0, 0, 2, 1), 0.0
pixel_shuffle pixel_unshuffle: 2
channel_shuffle native_channel_shuffle: 2
unfold: =F.unfold(x, 3, padding=1) if f is F.unfold else f(x, 2, 3, 2) | =F.unfold(x, 2, stride=2) if f is F.unfold else f(x, 1, 4, 4)
fold: =f(x.flatten(2), (7, 19), (2, 2)) if False else F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2)
scaled_dot_product_attention @tokens: y, y | y, y, is_causal=True | y, y, torch.zeros(6, 6)
multi_head_attention_forward @tokens: =f(x.mT.permute(2, 0, 1), y.mT.permute(2, 0, 1), y.mT.permute(2, 0, 1), 8, 2, p("w", 24, 8), p("b", 24), None, None, False, 0.0, p("o", 8, 8), p("q", 8), training=False)[0].transpose(0, 1)
lstm_cell @rows: =f(x, (y, y), p("w", 32, 8), p("v", 32, 8))[0]
gru_cell @rows: =f(x, y, p("w", 24, 8), p("v", 24, 8))
rnn_tanh_cell rnn_relu_cell @rows: =f(x, y, p("w", 8, 8), p("v", 8, 8))
lstm @tokens: =f(x, (torch.zeros(1, x.shape[0], 8), torch.zeros(1, x.shape[0], 8)), [p("w", 32, 8), p("v", 32, 8)], False, 1, 0.0, False, False, True)[0]
gru @tokens: =f(x, torch.zeros(1, x.shape[0], 8), [p("w", 24, 8), p("v", 24, 8)], False, 1, 0.0, False, False, True)[0]
rnn_tanh rnn_relu @tokens: =f(x, torch.zeros(1, x.shape[0], 8), [p("w", 8, 8), p("v", 8, 8)], False, 1, 0.0, False, False, True)[0]
to: torch.float64 | torch.float16 | "cpu"
double half float int long bool short byte char bfloat16: =f(x)
fill: 0.5
fill_ zero_: =(f(x[:, :2], 0.0) if "fill" in str(f) else f(x[:, :2]), x)[1]
zero: =(f(x[:, :2]), x)[1]
fill_diagonal: =x + f(torch.zeros(6, 6), 1.0)
fill_diagonal_: =x + f(torch.zeros(6, 6), 1.0)
copy: =(x[:, :2].copy_(y[:, :2]), x)[1] | =(x.copy_(y), x * 2)[1]
new_zeros new_ones: =x + f(x, (1, 8, 1, 1)) * 0.5
new_empty: =x + f(x, (1, 8, 1, 1)).fill_(0.5)
empty: =x + f(6, 6).fill_(0.5)
empty_permuted: =x + f((6, 6), (0, 1)).fill_(0.5)
empty_strided: =x + f((6, 6), (6, 1)).fill_(0.5)
new_full: =x + f(x, (1, 8, 1, 1), 0.5)
zeros ones: =torch.cat([x, f(x.shape[0], 2, 6, 6)], 1) | =x + f(6, 6)
full: =torch.cat([x, f((x.shape[0], 2, 6, 6), 0.5)], 1) | =x + f((6, 6), 0.5)
arange: =x + f(6.0) | =x + f(6)[:, None] | =x * f(x.shape[1])[:, None, None]
linspace logspace: =x + f(0.0, 1.0, 6)
eye: =x + f(6)
tensor as_tensor scalar_tensor: =x + f(0.5)
range: =x + f(0, 5)
hann_window hamming_window bartlett_window blackman_window kaiser_window: =x + f(6)
tril_indices triu_indices: =x[:, :, f(6, 6)[0], f(6, 6)[1]]
full_like: 0.5
empty_like new_tensor: =x + f(x).fill_(0.5) if "empty" in str(f) else x + f(x, 0.5)
vander linalg_vander: =x.mean() + f(torch.arange(6.0), 6).expand(x.shape[0], 6, 6) if f is torch.vander else x.mean() + f(torch.arange(6.0), N=6).expand(x.shape[0], 6, 6)
cov corrcoef: =f(x[0].flatten(1)).expand(x.shape[0], 8, 8)
addcmul_: x, y
trace: =f(x[0, 0]).expand(x.shape[0], 1)
diag: =f(x[0, 0]).expand(x.shape[0], 6)
diagflat: =f(x[0, 0, 0]).expand(x.shape[0], 6, 6)
nonzero_static: =f(x[0, 0], size=3).float().expand(x.shape[0], 3, 2)
combinations: =f(x[0, 0, 0]).expand(x.shape[0], 15, 2)
cartesian_prod: =f(x[0, 0, 0], y[0, 0, 0]).expand(x.shape[0], 36, 2)
pdist: =f(x[0, 0]).expand(x.shape[0], 15)
fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_rfft fft_rfft2 fft_rfftn fft_ihfft fft_ihfft2 fft_ihfftn: =f(x, dim=-1).real if str(f).rstrip(">").split()[2 if "method" in str(f) else -1].endswith("ft") else f(x, dim=(-2, -1)).real
fft_irfft fft_hfft: =f(torch.fft.rfft(x))
fft_irfft2 fft_hfft2: =f(torch.fft.rfft2(x))
fft_irfftn fft_hfftn: =f(torch.fft.rfftn(x, dim=(-2, -1)), dim=(-2, -1))
fft_fftshift fft_ifftshift: dim=(2, 3)
stft: =f(x[:, 0, 0], 4, return_complex=True).abs()
view_as_real: =f(torch.fft.fft(x))
view_as_complex: =f(x.reshape(-1, 8, 6, 3, 2)).real
complex polar: =f(x, y).real
angle abs absolute: =f(x)
real imag: =f(torch.fft.fft(x))
linalg_inv linalg_det linalg_pinv linalg_matrix_exp matrix_exp inverse det pinverse linalg_slogdet slogdet logdet linalg_cholesky cholesky linalg_qr linalg_svdvals linalg_eigvalsh linalg_eigh linalg_svd linalg_lu linalg_cond linalg_matrix_rank linalg_inv_ex linalg_lu_factor qr svd geqrf lu: =f(x @ x.mT + torch.eye(6))
linalg_solve linalg_solve_ex: =f(x @ x.mT + torch.eye(6), y)
linalg_lstsq: =f(x @ x.mT + torch.eye(6), y)[0]
linalg_solve_triangular: =f(x.triu() + 9 * torch.eye(6), y, upper=True)
"""

# name or pattern -> why it does not stand in a network. What gives no tensor is found by calling it.
LEFT_OUT = {
    r".*[Ll]oss.*|.*_loss|.*cross_entropy.*|kl_div|ctc_loss|AdaptiveLogSoftmaxWithLoss": "a loss: it stands behind the network, in training",
    r"(bernoulli|multinomial|poisson|binomial|rand|randn|randint|randperm|normal|rand_like|randn_like|randint_like|random|uniform|cauchy|exponential|geometric|log_normal|rrelu_with_noise|gumbel_softmax|fractional_max_pool\d.*|FractionalMaxPool\dd|svd_lowrank|pca_lowrank|seed|initial_seed|manual_seed|get_rng_state|set_rng_state)": "random: two runs differ, so nothing can be compared",
    r"Module|ModuleDict|ModuleList|ParameterDict|ParameterList|Container|Sequential|DataParallel|RNNBase|RNNCellBase": "holds layers or parameters and computes nothing of its own",
    r"Lazy.*": "becomes the layer without Lazy in its name at its first call",
    r".*sparse.*|.*_indices|indices|values|.*_values|coalesce|is_coalesced|.*_indices_copy|values_copy|indices_copy|smm|hspmm|spmm|hsmm|dsmm|saddmm|sspaddmm|_nnz|_dim[IV]|_coalesced|.*to_dense|to_mkldnn|nnz|dimI|dimV|sparse_.*|dense_dim": "of sparse tensors",
    r".*quantized.*|quantize_per.*|q_.*|int_repr|dequantize|fbgemm.*|choose_qparams.*|fake_quantize.*|fused_moving.*|qscheme|quantized_.*": "PyTorch's own quantization, which stands beside ours",
    r"batch_norm_.*|miopen.*|cudnn.*|mkldnn.*|.*backward.*|norm_except_dim|native_norm|grouped_mm|scaled_mm|scaled_grouped_mm|hash_tensor": "a part of another operator, of one kind of device or of training",
    r".*_copy": "the copying form of the operator without _copy in its name, which functionalization makes",
    r"as_strided.*|set|resize.*|resize|data|.*storage.*|apply|map|map2|share_memory|pin_memory|record_stream|view_copy|__?dlpack.*|dlpack.*|__(array|array_wrap|deepcopy|contains)__|_?coalesced|from_file|from_numpy|frombuffer|reduce_ex|setstate|format|repr|module_load|.*autocast.*|clear_.*|nested_.*|const_data_ptr|data_ptr|is_.*|nested_tensor.*": "reads or changes memory, not numbers",
    r"index": "of named dimensions",
    r"cuda|ipu|xpu|mtia|cpu|get_device": "moves to a device",
    r"H|chalf|cfloat|cdouble|geqrf|orgqr|ormqr|lobpcg|lu_solve|lu_unpack|cholesky_.*|triangular_solve|linalg_(cholesky_ex|eig|eigvals|householder_product|ldl.*|lu_factor_ex|lu_solve|tensorinv|tensorsolve)|istft|histogramdd|histogram|histc|bincount|unique.*|nonzero|argwhere|unravel_index|put|slice_inverse|fill_diagonal": "of complex numbers, of decompositions, or with as many values as the numbers want: no layer of a network",
    r"set_.*|get_.*|fork|wait|import_ir.*|parse_.*|merge_type.*|unify_type.*|init_num_threads|can_cast|promote_types|result_type|shape|dtype|device|__complex__|sym_.*|_sym_.*|allclose|equal|__(bool|float|int|long|index)__|len|item|tolist|numpy|numel|nelement|size|stride|dim|ndimension|dim_order|element_size|type|backward|register_.*|retain_grad|requires_grad|detach_|handle_torch_function|has_torch_function.*|assert_int_or_pair|boolean_dispatch|importlib": "gives a number or a setting, no tensor",
}
