"""What numbers will cost in a .terse file, without writing one: bytes of a tensor, bits of each value it could take.

A choice of steps, zeros or codebooks under a budget of bytes needs both often: `coded_bytes` is exact, `code_lengths`
tells for each number of a tensor what its own value and every other value would cost under the contexts that the
coder would be in, as they are once everything is known (the coder learns them on its way, so it takes a little more).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersenet.codec import contexts, numbers, phases, predicted, tensors


@dataclass(frozen=True)
class CodeLengths:
    """The cost of every value at every place of a tensor."""

    low: int  # the value of the first column of `bits`
    contexts: NDArray[np.uint16]  # of the tensor's shape: which row of `bits` a place uses
    bits: NDArray[np.float32]  # (contexts, values): the cost of value low + i

    def of(self, q: NDArray[np.int32]) -> NDArray[np.float32]:
        """The bits of each number of q (of the tensor's shape, within the table's values)."""
        return self.bits[self.contexts, q - self.low]


def coded_bytes(values: Tensor) -> int:
    """The bytes that a tensor's payload will have in a file, its entry in the head not counted. Exact.

    Raises:
        ValueError: for a dtype that a file does not have.
    """
    dtype = str(values.dtype).removeprefix("torch.")
    if dtype not in tensors.SIZES:
        raise ValueError(f"a .terse file holds no {dtype}; allowed: {', '.join(tensors.SIZES)}")
    flat = (values.detach().cpu() + 0.0 if values.is_floating_point() else values.detach().cpu()).contiguous()
    return len(tensors.encode(dtype, tuple(values.shape), flat.reshape(-1).view(torch.uint8).numpy())[1])


def code_lengths(q: NDArray[np.int32], spread: int = 1) -> CodeLengths:
    """What each value would cost at each place, given all others as they are.

    Args:
        q: numbers of any shape, of at most 255 - spread in magnitude; at least one.
        spread: how many values beyond the smallest and the largest of q, and beyond 0, the table has.
    Raises:
        ValueError: when a number is too large.
    """
    low, high = min(0, int(q.min())) - spread, max(0, int(q.max())) + spread
    if low < -numbers.LIMIT or high > numbers.LIMIT:
        raise ValueError(f"numbers reach from {low} to {high} with their spread; at most {numbers.LIMIT} is allowed")
    if phases.kernel(q.shape) is not None and q.min() < 0 < q.max():
        return _predicted_lengths(q.astype(np.int32), max(high, -low))
    found = contexts.contexts_of(q.astype(np.int32).reshape(-1), q.shape)
    start = [contexts.starting_model(context, low, high, 1) for context in range(contexts.CONTEXTS)]
    bits = _learned(found, q.reshape(-1) - low, np.array(start))
    return CodeLengths(low, found.reshape(q.shape).astype(np.uint16), bits)


def _predicted_lengths(q: NDArray[np.int32], reach: int) -> CodeLengths:
    """Contexts whose forecast is negative are rows of their own, mirrored: both signs learn together."""
    keys, signs = predicted.keys_of(q.reshape(-1), q.shape)
    start = [predicted.starting_weights(context, reach, 1) for context in range(contexts.CONTEXTS)]
    bits = _learned(keys, q.reshape(-1) * signs + reach, np.concatenate(start))
    rows = keys.astype(np.uint16) + np.where(signs < 0, predicted.KEYS, 0).astype(np.uint16)
    return CodeLengths(-reach, rows.reshape(q.shape), np.concatenate([bits, bits[:, ::-1]]))


def _learned(rows: NDArray[np.integer], symbols: NDArray[np.integer], start: NDArray[np.int64]) -> NDArray[np.float32]:
    """(rows, n) bits of each symbol once a row has seen all of its own."""
    size = start.shape[1]
    counts = np.bincount(rows.astype(np.int64) * size + symbols, minlength=start.size).reshape(start.shape)
    weights = (start + 64 * counts).astype(np.float64)
    return (-np.log2(weights / weights.sum(1, keepdims=True))).astype(np.float32)
