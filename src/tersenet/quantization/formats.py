"""The names of formats of weights, such as "int4" or "kmeans4", and the code that a layer gets for one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tersenet.bricks.coded import rounded_kind
from tersenet.bricks.quantized import quantized_kind
from tersenet.errors import SettingsError

# pattern -> kind of code (bricks/codes.py)
_KINDS = (
    (r"int([2-8])", "grid"),
    (r"(fp16|bf16|fp8_e4m3|fp8_e5m2)", "float"),
    (r"pot([2-8])", "power"),
    (r"kmeans([1-8])", "book"),
    (r"(ternary)", "ternary"),
    (r"binary([1-4])", "bases"),
    (r"(pq)", "piece"),
)
NAMES = (
    "int2 to int8, fp16, bf16, fp8_e4m3, fp8_e5m2, pot2 to pot8 (powers of two), kmeans1 to kmeans8 (codebooks), "
    "pq (product quantization), ternary, binary1 to binary4 (sums of scaled signs)"
)
_FLOAT_BITS = {"fp16": 16, "bf16": 16, "fp8_e4m3": 8, "fp8_e5m2": 8}


@dataclass(frozen=True)
class Storage:
    """What formats leave open; see `Quantize`."""

    granularity: str | int = "channel"
    symmetric: bool = True
    piece: int = 4
    pieces: int = 256

    def entry(self, name: str, shape: tuple[int, ...]) -> dict[str, Any] | None:
        """What a plan says of a weight (O, ...) in a format; None where the weight is too small for pieces."""
        form = Format.named(name)
        settings: dict[str, Any] | None = {}
        if form.kind == "grid":
            settings = {"bits": form.bits, "signed": self.symmetric, "granularity": self.granularity}
        elif form.kind == "float":
            settings = {"format": name}
        elif form.kind == "piece":
            settings = _pieces(shape, self)
        elif form.kind != "ternary":
            settings = {"count" if form.kind == "bases" else "bits": form.bits}
        return None if settings is None else {"weights": name, "code": form.kind, **settings}


@dataclass(frozen=True)
class Format:
    """A format by its name.

    Args:
        kind: of the code.
        bits: of one weight, without what is shared; of pieces, those of `Storage`'s defaults, rounded up.
    """

    name: str
    kind: str
    bits: int

    @classmethod
    def named(cls, name: str, where: str = "weights") -> Format:
        """Raises SettingsError for a name that there is not."""
        for pattern, kind in _KINDS:
            found = re.fullmatch(pattern, str(name))
            if found:
                text = found.group(1)
                bits = int(text) if text.isdigit() else {**_FLOAT_BITS, "ternary": 2, "pq": 2}[text]
                return cls(name, kind, bits)
        raise SettingsError(f"{where} must be a format, got {name!r}; there are {NAMES}")


def _pieces(shape: tuple[int, ...], storage: Storage) -> dict[str, Any] | None:
    """The longest pieces within what was asked that divide the inputs, and at most one codebook entry for four pieces,
    since the codebook is stored too."""
    inputs = torch.Size(shape[1:]).numel()
    length = next(length for length in range(storage.piece, 0, -1) if inputs % length == 0)
    count = min(storage.pieces, shape[0] * (inputs // length) // 4)
    return {"length": length, "count": count, "shared": True} if length > 1 and count >= 2 else None


def in_integers(layer: nn.Module, entry: dict[str, Any]) -> nn.Module | None:
    """The brick for integer arithmetic that a plan's entry asks for; None where the layer has none."""
    kind = quantized_kind(layer)
    return None if kind is None else kind.of(layer, bits=Format.named(entry["weights"]).bits)


def for_storage(layer: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """The brick for weights alone that a plan's entry asks for."""
    kind = rounded_kind(layer)
    assert kind is not None, "the caller looked"
    settings = {name: value for name, value in entry.items() if name not in ("weights", "code")}
    return kind.of(layer, entry["code"], settings)
