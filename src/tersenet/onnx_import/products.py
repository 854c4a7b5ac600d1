"""Products of matrices: linear layers where one factor is constant."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.onnx_import.call import Call, parameter
from tersenet.onnx_import.registry import operator
from tersenet.onnx_import.values import Host


def _linear(weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    """A linear layer of numbers (O, I)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(bias)
    return layer


@operator("MatMul")
def matmul(call: Call) -> Tensor:
    """With a third input, a bias that was added to the product alone (steps.py)."""
    weight, bias = call.constant(1), call.constant(2)
    if weight is None or weight.array.ndim != 2 or weight.array.dtype != np.float32:
        product = torch.matmul(call.tensor(0), call.tensor(1))
        return product if bias is None else product + call.tensor(2)
    x = call.tensor(0)

    def make() -> nn.Module:
        return _linear(weight.array.T, None if bias is None else bias.array)

    return call.layer(make, weight, bias)(x)


@operator("Gemm")
def gemm(call: Call) -> Tensor:
    x, alpha, beta = call.tensor(0), call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    x = x.t() if call.attribute("transA", 0) else x
    turned = bool(call.attribute("transB", 0))
    weight, added = call.constant(1), call.constant(2)
    if weight is None or weight.array.dtype != np.float32:
        other = call.tensor(1).t() if turned else call.tensor(1)
        product = alpha * torch.matmul(x, other) if alpha != 1 else torch.matmul(x, other)
        return product + beta * call.tensor(2) if call.has(2) else product
    matrix = (weight.array if turned else weight.array.T) * np.float32(alpha)
    bias = _bias(added, len(matrix), beta)
    y = call.layer(lambda: _linear(matrix, bias), weight, added)(x)
    return y if bias is not None or not call.has(2) else y + beta * call.tensor(2)


def _bias(added: Host | None, outputs: int, beta: float) -> np.ndarray | None:
    """What is added to all rows alike, (O,); None where it is not."""
    if added is None or added.array.shape not in ((outputs,), (1, outputs), (), (1,), (1, 1)):
        return None
    return np.broadcast_to(added.array.reshape(-1), (outputs,)) * np.float32(beta)


@operator("Einsum")
def einsum(call: Call) -> Tensor:
    equation = call.attribute("equation").replace(" ", "")
    return torch.einsum(equation, *(call.tensor(i) for i in range(len(call.values))))


@operator("Attention")
def attention(call: Call) -> Tensor:
    """Attention of operator set 23, without a memory of earlier keys and values."""
    if any(call.has(i) for i in (4, 5, 6)) or any(call.uses(i) for i in (1, 2, 3)):
        call.refuse("keeps keys and values of earlier calls or gives its products, which is not supported")
    if call.attribute("softcap", 0.0) or call.attribute("qk_matmul_output_mode", 0):
        call.refuse("limits or gives its products, which is not supported")
    call.ignore("softmax_precision")
    q, k, v = (call.tensor(i) for i in range(3))
    heads, key_heads = call.attribute("q_num_heads"), call.attribute("kv_num_heads")
    flat = q.dim() == 3
    if flat:
        q, k, v = (_in_heads(x, count) for x, count in ((q, heads), (k, key_heads), (v, key_heads)))
    mask = call.tensor(3) if call.has(3) else None
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    causal = bool(call.attribute("is_causal", 0))
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        call.refuse("is causal and has a mask or keys of another length, which is not supported")
    repeated = q.shape[1] // k.shape[1]
    if repeated > 1:
        k, v = k.repeat_interleave(repeated, 1), v.repeat_interleave(repeated, 1)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=call.attribute("scale"))
    return y.transpose(1, 2).flatten(2) if flat else y


def _in_heads(x: Tensor, count: int) -> Tensor:
    """(N, T, C) as (N, heads, T, C / heads)."""
    return x.unflatten(2, (count, -1)).transpose(1, 2)
