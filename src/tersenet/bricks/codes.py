"""How the weights of a layer are stored: a code for each weight, and what the codes share (scales, codebooks).

One class for each kind of storage. All of them round trainable weights with a straight-through gradient, say the codes
of weights, and give the weights of codes back; `round(w)` and `decode(encode(w))` are equal. The arithmetic and its
papers are in tersenet.numerics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersenet.numerics.float_formats import FLOATS, encode, round_float
from tersenet.numerics.grids import Grid
from tersenet.numerics.product_quantization import from_pieces


class Code(nn.Module):
    """What the kinds share. Buffers are the numbers that codes share; `fit` of a step chooses them.

    Args:
        shape: of the weight, (O, ...).
    """

    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]]  # of the settings, which are attributes too

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def settings(self) -> dict[str, Any]:
        """What builds an empty code of the same kind, with the shape. JSON only."""
        return {name: getattr(self, name) for name in self.names}

    def round(self, weight: Tensor) -> Tensor:
        """The weight as it is stored, in its own shape and type; the gradient passes through."""
        raise TypeError(f"{type(self).__name__} does not say how it rounds")

    def encode(self, weight: Tensor) -> Tensor:
        """The code of each weight."""
        raise TypeError(f"{type(self).__name__} does not say its codes")

    def decode(self, codes: Tensor) -> Tensor:
        """The weights (O, ...) of codes."""
        raise TypeError(f"{type(self).__name__} does not say its weights")

    def empty(self) -> Tensor:
        """Codes that mean nothing yet, of the right shape and type."""
        return torch.zeros(self.shape, dtype=torch.uint8)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class GridCode(Code):
    """Integers of 2 to 8 bits times a scale; codes (O, ...) int8, of an affine grid uint8.

    Buffers: scale (P, G), and of an affine grid zero_point (P, G) uint8, shared as `granularity` says (numerics/grids).
    """

    kind, names = "grid", ("bits", "signed", "granularity")
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self, shape: Sequence[int], bits: int, signed: bool = True, granularity: str | int = "channel"
    ) -> None:
        super().__init__(shape)
        self.grid = Grid(bits, signed, granularity)
        self.bits, self.signed, self.granularity = bits, signed, granularity
        rows = 1 if granularity == "tensor" else self.shape[0]
        inputs = torch.Size(self.shape[1:]).numel()
        groups = -(-inputs // granularity) if isinstance(granularity, int) else 1
        self.register_buffer("scale", torch.ones(rows, groups))
        self.register_buffer("zero_point", None if signed else torch.zeros(rows, groups, dtype=torch.uint8))

    @property
    def zeros(self) -> Tensor:
        """(P, G) zero points in the type of the scale."""
        return torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point.to(self.scale.dtype)

    def round(self, weight: Tensor) -> Tensor:
        return self.grid.round(weight, self.scale, self.zeros)

    def encode(self, weight: Tensor) -> Tensor:
        return self.grid.integers(weight, self.scale, self.zeros)

    def decode(self, codes: Tensor) -> Tensor:
        scale = self.grid.spread(self.scale, self.shape)
        whole = codes.to(scale.dtype)
        return whole * scale if self.signed else (whole - self.grid.spread(self.zeros, self.shape)) * scale

    def empty(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.int8 if self.signed else torch.uint8)


class FloatCode(Code):
    """Short floats; codes (O, ...) of the format's own type, of the two of 8 bits as their bytes, uint8.

    Buffers: of the formats of 8 bits scale (O,), a power of two for each output, because their range is short.
    """

    kind, names = "float", ("format",)
    scale: Tensor | None

    def __init__(self, shape: Sequence[int], format: str) -> None:
        super().__init__(shape)
        if format not in FLOATS:
            raise ValueError(f"a float format must be one of {', '.join(FLOATS)}, got {format!r}")
        self.format = format
        self.register_buffer("scale", torch.ones(self.shape[0]) if format.startswith("fp8") else None)

    @property
    def beside(self) -> Tensor | None:
        """(O, 1, ...): the scale, to stand beside a weight."""
        return None if self.scale is None else self.scale.reshape(-1, *(1,) * (len(self.shape) - 1))

    def round(self, weight: Tensor) -> Tensor:
        if self.beside is None:
            return round_float(weight, self.format)
        return round_float(weight / self.beside, self.format) * self.beside

    def encode(self, weight: Tensor) -> Tensor:
        if self.beside is None:
            return encode(weight, self.format)
        return encode(weight / self.beside, self.format).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        if self.beside is None:
            return codes.to(torch.float32)
        return codes.view(FLOATS[self.format]).to(self.beside.dtype) * self.beside

    def empty(self) -> Tensor:
        return torch.zeros(self.shape, dtype=FLOATS[self.format] if self.scale is None else torch.uint8)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


class TableCode(Code):
    """Each weight is one of a few values that a layer or an output shares; codes (O, ...) uint8, places in the table.

    y = the nearest value of the table; dy/dw = 1, and the gradient of a value is the sum over the weights that take it
    (Han et al., arXiv:1510.00149, equation 3), which reaches whatever the table is computed from.
    """

    def table(self) -> Tensor:
        """(P, k) values in rising order; P is 1 or O."""
        raise TypeError(f"{type(self).__name__} does not say its table")

    def round(self, weight: Tensor) -> Tensor:
        value = self.decode(self.encode(weight))
        if torch.is_grad_enabled() and (weight.requires_grad or value.requires_grad):
            return _Through.apply(weight, value)
        return value.to(weight.dtype)

    def encode(self, weight: Tensor) -> Tensor:
        table = self.table().detach().double()
        rows = weight.detach().double().reshape(len(table), -1)
        middles = (table[:, 1:] + table[:, :-1]) / 2
        return torch.searchsorted(middles.contiguous(), rows.contiguous()).reshape(self.shape).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        table = self.table()
        places = codes.reshape(len(table), -1).to(torch.int64)
        return torch.gather(table, 1, places).reshape(self.shape)


class BookCode(TableCode):
    """The 2^bits values of a codebook, which a layer shares. Buffers: codebook (k,) in rising order."""

    kind, names = "book", ("bits",)
    codebook: Tensor

    def __init__(self, shape: Sequence[int], bits: int) -> None:
        super().__init__(shape)
        if not 1 <= bits <= 8:
            raise ValueError(f"bits of a codebook must lie in 1..8, got {bits}")
        self.bits = bits
        self.register_buffer("codebook", torch.linspace(-1, 1, 2**bits))

    def table(self) -> Tensor:
        return self.codebook[None]


class PowerCode(TableCode):
    """0 and plus or minus a power of two, 2^(bits - 2) of them (numerics/powers_of_two).

    Buffers: top () int8, the highest exponent, which a layer shares.
    """

    kind, names = "power", ("bits",)
    top: Tensor

    def __init__(self, shape: Sequence[int], bits: int) -> None:
        super().__init__(shape)
        if not 2 <= bits <= 8:
            raise ValueError(f"bits of powers of two must lie in 2..8, got {bits}")
        self.bits = bits
        self.register_buffer("top", torch.zeros((), dtype=torch.int8))

    def table(self) -> Tensor:
        count = 2 ** (self.bits - 2)
        sizes = torch.exp2(self.top.float() - torch.arange(count, device=self.top.device))  # falling
        return torch.cat([-sizes, sizes.new_zeros(1), sizes.flip(0)])[None]

    def encode(self, weight: Tensor) -> Tensor:
        # In the middle between two values the paper takes the larger magnitude, where a table takes the lower value.
        sizes = self.table()[0, 2 ** (self.bits - 2) :].double()  # 0 and the powers, rising
        place = torch.bucketize(weight.detach().abs().double().contiguous(), (sizes[1:] + sizes[:-1]) / 2, right=True)
        return (place * torch.sign(weight.detach()) + 2 ** (self.bits - 2)).to(torch.uint8)


class TernaryCode(TableCode):
    """-a, 0 and a, a for each output: +-a beyond a threshold. Buffers: scale (O,), threshold (O,)."""

    kind, names = "ternary", ()
    scale: Tensor
    threshold: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape)
        self.register_buffer("scale", torch.ones(self.shape[0]))
        self.register_buffer("threshold", torch.full((self.shape[0],), 0.5))

    def table(self) -> Tensor:
        return torch.stack([-self.scale, torch.zeros_like(self.scale), self.scale], dim=1)

    def encode(self, weight: Tensor) -> Tensor:
        limit = self.threshold.reshape(-1, *(1,) * (len(self.shape) - 1))
        return ((weight > limit).to(torch.uint8) + (weight >= -limit).to(torch.uint8)).to(torch.uint8)


class BasesCode(TableCode):
    """A sum of M scaled signs, each output with its own scales: the nearest of the 2^M sums. Buffers: scales (M, O)."""

    kind, names = "bases", ("count",)
    scales: Tensor

    def __init__(self, shape: Sequence[int], count: int) -> None:
        super().__init__(shape)
        if not 1 <= count <= 8:
            raise ValueError(f"binary bases must number 1 to 8, got {count}")
        self.count = count
        self.register_buffer("scales", torch.ones(count, self.shape[0]))

    def combinations(self) -> Tensor:
        """(2^M, M) of -1 and 1."""
        numbers = torch.arange(2**self.count, device=self.scales.device)[:, None]
        chosen = torch.remainder(
            numbers.div(2 ** torch.arange(self.count, device=numbers.device), rounding_mode="floor"), 2
        )
        return (2 * chosen - 1).to(self.scales.dtype)

    def table(self) -> Tensor:
        return (self.combinations() @ self.scales).T.sort(dim=1).values  # (2^M, O) -> (O, 2^M)

    def signs(self, weight: Tensor) -> Tensor:
        """(O, ..., M) the signs of each weight."""
        places = (self.combinations() @ self.scales).T.sort(dim=1).indices  # (O, 2^M)
        codes = self.encode(weight).flatten(1).long()
        return self.combinations()[places.gather(1, codes)].reshape(*self.shape, self.count)


class PieceCode(Code):
    """Pieces of d weights of an output, each one of k; codes (O, I / d) uint8. Buffers: codebooks (S, k, d).

    Args:
        length: d, divides the inputs of an output, I H W.
        count: k, 2 to 256.
        shared: one codebook for all places of an output (S = 1), else one for each (S = I / d).
    """

    kind, names = "piece", ("length", "count", "shared")
    codebooks: Tensor

    def __init__(self, shape: Sequence[int], length: int, count: int, shared: bool = True) -> None:
        super().__init__(shape)
        inputs = torch.Size(self.shape[1:]).numel()
        if length < 1 or inputs % length or not 1 <= count <= 256:
            raise ValueError(f"pieces of {length} of {inputs} inputs, {count} of them, cannot be")
        self.length, self.count, self.shared = length, count, shared
        self.register_buffer("codebooks", torch.zeros(1 if shared else inputs // length, count, length))

    def round(self, weight: Tensor) -> Tensor:
        value = self.decode(self.encode(weight))
        if torch.is_grad_enabled() and (weight.requires_grad or value.requires_grad):
            return _Through.apply(weight, value)
        return value.to(weight.dtype)

    def encode(self, weight: Tensor) -> Tensor:
        pieces = weight.detach().reshape(self.shape[0], -1, self.length)  # (O, I / d, d)
        books = self.codebooks.detach().expand(pieces.shape[1], -1, -1)  # (I / d, k, d)
        return torch.cdist(pieces.movedim(1, 0).double(), books.double()).argmin(dim=2).T.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return from_pieces(self.codebooks, codes).reshape(self.shape)

    def empty(self) -> Tensor:
        inputs = torch.Size(self.shape[1:]).numel()
        return torch.zeros(self.shape[0], inputs // self.length, dtype=torch.uint8)


CODES: dict[str, type[Code]] = {
    code.kind: code for code in (GridCode, FloatCode, BookCode, PowerCode, TernaryCode, BasesCode, PieceCode)
}


def make_code(kind: str, shape: Sequence[int], settings: dict[str, Any]) -> Code:
    """An empty code of a kind. Raises ValueError for kinds and settings that there are not."""
    if kind not in CODES:
        raise ValueError(f"a code must be one of {', '.join(CODES)}, got {kind!r}")
    return CODES[kind](shape, **settings)
