"""How many multiply-adds, multiplications and additions one operator or one layer needs: a table, and a few formulas.

Numbers only, from shapes: nothing here looks at a graph. The conventions are those of `tersenet.graph.costs`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]

_PER_ELEMENT: dict[str, tuple[int, int]] = {
    # name: (additions, multiplications) for each element of the output
    "add": (1, 0), "sub": (1, 0), "rsub": (1, 0), "mul": (0, 1), "div": (0, 1), "reciprocal": (0, 1), "square": (0, 1),
    "pow": (0, 1), "sqrt": (0, 1), "rsqrt": (0, 2), "exp": (0, 1), "log": (0, 1), "erf": (0, 1), "tanh": (0, 1),
    "batchnorm": (1, 1), "frozenbatchnorm": (1, 1),
    "sigmoid": (1, 2), "silu": (1, 3), "gelu": (1, 4), "mish": (1, 4), "softplus": (1, 2), "elu": (1, 1),
    "hardsigmoid": (1, 1), "hardswish": (1, 2), "leakyrelu": (0, 1), "prelu": (0, 1),
    # greatest subtracted, exponential, sum, division
    "softmax": (2, 2), "logsoftmax": (3, 2),
    # sum, centre, sum of squares, shift; square, divide, scale
    "layernorm": (4, 3), "groupnorm": (4, 3), "instancenorm": (4, 3), "rmsnorm": (1, 3),
    "fakequantizeperchannelaffine": (2, 2), "fakequantizepertensoraffine": (2, 2),
}  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Arithmetic of one operator. `multiplications` and `additions` include those of the `macs`."""

    macs: int = 0
    multiplications: int = 0
    additions: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.macs + other.macs,
            self.multiplications + other.multiplications,
            self.additions + other.additions,
        )

    def __floordiv__(self, samples: int) -> Counts:
        return Counts(self.macs // samples, self.multiplications // samples, self.additions // samples)


def products(macs: int, sums: int, bias: bool = False) -> Counts:
    """Sums of products: `macs` terms in `sums` results need one addition less per result, and one more for a bias."""
    return Counts(macs, macs, max(0, macs - sums) + (sums if bias else 0))


def operator_name(name: str) -> str:
    """One name for a torch.nn class and its aten operator: `BatchNorm2d`, `batch_norm` -> `batchnorm`."""
    return re.sub(r"([123]d)?$", "", name.lower().strip("_").replace("_", ""))


def geometry(layer: Any) -> Shape | None:
    """(O, I / groups, *kernel) where a layer has a convolution's attributes, (O, I) for a linear layer's, else None."""
    if all(hasattr(layer, name) for name in ("in_channels", "out_channels", "kernel_size", "groups", "stride")):
        kernel = layer.kernel_size if isinstance(layer.kernel_size, tuple | list) else (layer.kernel_size,) * 2
        return (layer.out_channels, layer.in_channels // layer.groups, *kernel)
    if all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features")):
        return (layer.out_features, layer.in_features)
    return None


def counts_of_layer(layer: Any, inputs: Shape, outputs: Shape) -> Counts | None:
    """A torch.nn layer, or a brick with a convolution's or a linear layer's attributes; None when there is no formula.

    Args:
        layer: read for its attributes only.
        inputs: shape of its input.
        outputs: shape of its output.
    """
    bias = getattr(layer, "bias", None) is not None
    shape = geometry(layer)
    if shape is not None and getattr(layer, "transposed", False):
        # Every input value meets one filter of (O / groups, *kernel).
        macs = math.prod(inputs) * (layer.out_channels // layer.groups) * math.prod(shape[2:])
        return products(macs, math.prod(outputs), bias)
    if shape is not None:
        return products(math.prod(outputs) * math.prod(shape[1:]), math.prod(outputs), bias)
    if not type(layer).__module__.startswith("torch.nn.modules"):
        return None
    name = operator_name(type(layer).__name__)
    if name == "avgpool":
        return _window(layer.kernel_size, type(layer).__name__, outputs)
    if name == "adaptiveavgpool":
        return _mean(inputs, outputs)
    if name in _PER_ELEMENT:
        return _per_element(name, outputs)
    return Counts() if name in _FREE_LAYERS else None


_FREE_LAYERS = frozenset(
    {
        "identity", "dropout", "alphadropout", "featurealphadropout", "flatten", "unflatten", "relu", "relu6",
        "hardtanh", "threshold", "maxpool", "adaptivemaxpool", "zeropad", "constantpad", "reflectionpad",
        "replicationpad", "circularpad", "pixelshuffle", "pixelunshuffle", "channelshuffle", "upsample",
        "upsamplingnearest", "upsamplingbilinear", "embedding", "fold", "unfold",
    }
)  # fmt: skip
"""Layers of comparisons, look-ups and moves. Interpolation counts as a look-up."""


def counts_of_operator(name: str, args: Sequence[Any], shapes: Sequence[Any], outputs: Shape) -> Counts:
    """An aten operator.

    Args:
        name: as `aten.NAME.overload` has it; in-place names are the same operator.
        args: its arguments; only plain numbers and strings are read.
        shapes: for each argument its shape, a list of shapes for a list of tensors, or None where it is no tensor.
        outputs: shape of its output.
    """
    size = math.prod(outputs)
    plain = name.strip("_")
    if plain in ("conv1d", "conv2d", "conv3d", "convolution"):
        transposed = plain == "convolution" and bool(args[6])
        if transposed:
            return _transposed(shapes, size)
        return products(size * math.prod(shapes[1][1:]), size, _given(shapes, 2))
    if plain.startswith("conv_transpose"):
        return _transposed(shapes, size)
    if plain == "linear":
        return products(size * shapes[1][-1], size, _given(shapes, 2))
    if plain in ("mm", "matmul", "bmm", "mv", "dot", "vdot"):
        return products(size * shapes[0][-1], size)
    if plain in ("addmm", "baddbmm", "addbmm", "addmv"):
        return products(size * shapes[1][-1], size, bias=True)
    if plain == "einsum":
        return _einsum(args[0], shapes[1], size)
    if plain == "scaled_dot_product_attention":
        return _attention(*shapes[:3])
    if plain in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        # Per time step and sample every matrix of every layer and direction is used once.
        steps = math.prod(shapes[0][:-1])
        macs = steps * sum(math.prod(shape) for shape in shapes[2] if len(shape) == 2)
        return products(macs, 0)
    if plain in ("avg_pool1d", "avg_pool2d", "avg_pool3d"):
        return _window(args[1], plain, outputs)
    if plain in ("mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"):
        return _mean(shapes[0], outputs)
    if plain == "sum":
        return Counts(0, 0, max(0, math.prod(shapes[0]) - size))
    return _per_element(operator_name(plain), outputs)


def _given(shapes: Sequence[Any], index: int) -> bool:
    return len(shapes) > index and shapes[index] is not None


def _per_element(name: str, outputs: Shape) -> Counts:
    additions, multiplications = _PER_ELEMENT.get(name, (0, 0))
    size = math.prod(outputs)
    return Counts(0, multiplications * size, additions * size)


def _transposed(shapes: Sequence[Any], size: int) -> Counts:
    return products(math.prod(shapes[0]) * math.prod(shapes[1][1:]), size, _given(shapes, 2))


def _mean(inputs: Shape, outputs: Shape) -> Counts:
    """Each input value is added once; each result is divided once."""
    return Counts(0, math.prod(outputs), max(0, math.prod(inputs) - math.prod(outputs)))


def _window(kernel: Any, name: str, outputs: Shape) -> Counts:
    """A mean over windows of (*kernel); `name` ends in 1d, 2d or 3d, for a kernel given as one number."""
    sides = tuple(kernel) if isinstance(kernel, tuple | list) else (kernel,)
    taps = math.prod(sides * int(name[-2]) if len(sides) == 1 else sides)
    return Counts(0, math.prod(outputs), math.prod(outputs) * (taps - 1))


def _attention(query: Shape, key: Shape, value: Shape) -> Counts:
    """softmax(Q K^T / sqrt(E)) V for Q (..., L, E), K (..., S, E), V (..., S, D)."""
    rows, keys = math.prod(query[:-1]), key[-2]
    scores, mixed = products(rows * keys * query[-1], rows * keys), products(rows * keys * value[-1], rows * value[-1])
    softmax = _per_element("softmax", (rows, keys))
    return scores + Counts(0, rows * keys, 0) + softmax + mixed  # the scale is one multiplication each


def _einsum(equation: str, shapes: Sequence[Shape], size: int) -> Counts:
    """Operands are contracted from left to right; an index is summed as soon as nothing to its right needs it."""
    terms, _, result = equation.replace(" ", "").partition("->")
    names = [_letters(term, shape) for term, shape in zip(terms.split(","), shapes, strict=True)]
    if "->" not in equation:
        flat = [letter for term in names for letter in term]
        result = "".join(sorted(letter for letter in set(flat) if flat.count(letter) == 1 and letter.isalpha())) + "..."
    sides = {
        letter: side
        for term, shape in zip(names, shapes, strict=True)
        for letter, side in zip(term, shape, strict=True)
    }
    total, held = Counts(), set(names[0])
    for position, term in enumerate(names[1:], start=2):
        both = held | set(term)
        later = set(result).union(*names[position:]) | {letter for letter in both if letter.isdigit()}
        held = both & later
        total += products(math.prod(sides[letter] for letter in both), math.prod(sides[letter] for letter in held))
    return total if len(names) > 1 else Counts(0, 0, max(0, math.prod(shapes[0]) - size))


def _letters(term: str, shape: Shape) -> list[str]:
    """One letter per dimension; those under "..." are numbered from the right, so that operands share them."""
    free = len(shape) - len(term.replace("...", ""))
    dots = [str(number) for number in reversed(range(free))]
    before, _, after = term.partition("...")
    return [*before, *dots, *after]


def stands_for(layer: Any, stored: Sequence[Tensor]) -> bool:
    """Whether a layer with a convolution's or linear layer's attributes really is one dense product.

    A low-rank brick has the same attributes and stores something else: then no tensor has the dense weight's size.
    """
    shape = geometry(layer)
    if shape is None:
        return False
    sizes = [tensor.numel() for tensor in stored if tensor.dim() >= 2]
    dense, scales = math.prod(shape), max(shape[0], shape[1])
    return dense in sizes and all(size == dense or size <= scales for size in sizes)
