"""Holds an imported model to its file: all outputs, in ONNX Runtime, with two batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersenet.errors import ModelError
from tersenet.onnx_import.network import Network
from tersenet.onnx_import.original import Original
from tersenet.onnx_import.values import as_tensor

TOLERANCE = 1e-4  # of an output's largest entry: what summing in another order may change in float32
_OTHER_PLACES = 1e-3  # share of whole numbers (places of a maximum) that may differ where two are nearly the same


def verify(model: nn.Module, network: Network, original: Original, inputs: Sequence[np.ndarray]) -> None:
    """Compares the outputs for one batch.

    Raises:
        ModelError: where they differ; names the first node that does, where it is found.
    """
    references = original.run(inputs)
    tensors = [as_tensor(each) for each in inputs]
    with torch.no_grad():
        outputs = [each.numpy() for each in tree_leaves(model(*tensors))]
    for name, reference, output in zip(original.outputs, references, outputs, strict=True):
        wrong = difference(reference, output)
        if wrong is not None:
            where = _first(network, original, inputs)
            raise ModelError(
                f"{original.file.name} cannot be imported: for a batch of {len(inputs[0])} its output {name!r} {wrong} "
                f"from what ONNX Runtime computes{where}; please report the file, or give the model's PyTorch code"
            )


def difference(reference: np.ndarray, output: np.ndarray) -> str | None:
    """How an output differs, as the predicate of a sentence; None where it does not."""
    if reference.shape != output.shape:
        return f"differs in its shape ({_said(output.shape)} instead of {_said(reference.shape)})"
    if reference.dtype.kind in "iub":
        share = float(np.mean(reference != output)) if reference.size else 0.0
        return f"differs in {share:.1%} of its entries" if share > _OTHER_PLACES else None
    finite = np.isfinite(reference)
    if not np.array_equal(reference[~finite], output[~finite], equal_nan=True) or not np.isfinite(output[finite]).all():
        return "differs in NaN or infinities"
    if not finite.any():
        return None
    error = float(np.abs(reference[finite].astype(np.float64) - output[finite]).max())
    largest = float(np.abs(reference[finite]).max())
    return f"differs by {error:.2g} of {largest:.2g}" if error > TOLERANCE * largest else None


def _said(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _first(network: Network, original: Original, inputs: Sequence[np.ndarray]) -> str:
    """The first node whose output differs for one call with the file's own batch."""
    part = [each[: original.batch] for each in inputs] if original.batch is not None else list(inputs)
    with torch.no_grad():
        own = network.run([as_tensor(each) for each in part], keep=True)
    makers = {name: step for step in network.steps for name in step.outputs}
    kept = [name for name, value in own.items() if name in makers and isinstance(value, Tensor)]
    try:
        reference = original.values(part, kept)
    except Exception:  # noqa: BLE001 - the runtime does not give every value
        return ""
    for name in kept:
        if difference(reference[name], own[name].numpy()) is not None:
            return f", and the first that differs is {makers[name].label}"
    return " although every operator agrees with the file's own batch: the file mixes its samples"
