"""What zeros are worth: bytes once they are coded, and time on the kernels that there are. Zeros that buy nothing are
called so.

    from tersenet.pruning.worth import table, worth
    print(table(worth(model)))

Times are those of docs/pruning-weights.md, measured with sparse kernels of our own on one core of a Xeon with AVX-512
(8 convolutions of ImageNet size, batch 1, geometric means). No runtime that a model is exported to has such kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersenet.bricks.mask import mask_of
from tersenet.numerics.patterns import Pattern, expand, parse, unit_sums
from tersenet.numerics.ranges import weight_scales
from tersenet.numerics.rounding import quantize
from tersenet.numerics.sparse_bytes import bitmap, bound, dense, distances
from tersenet.pruning.choose import output_first

# Zeros -> how many times as fast as the best dense float and int8 kernels.
SINGLE = {0.70: (1.59, 0.46), 0.80: (2.19, 0.63), 0.90: (3.74, 1.08), 0.95: (6.38, 1.84)}
BLOCKS = {0.50: (1.47, 0.42), 0.70: (2.47, 0.71), 0.80: (3.44, 0.99), 0.90: (6.23, 1.79), 0.95: (10.49, 3.02)}


@dataclass(frozen=True)
class Row:
    """A layer with zeros, or all of them together.

    Args:
        layer: its path, or "all".
        pattern: of its mask; "none" where the zeros are in the weight itself.
        sparsity: share of zeros.
        weights: how many there are, zeros too.
        bytes: how stored -> bytes. "float" and "int8" in full, "... bitmap" with a bit per unit, "... 4 bits" and
            "... 5 bits" with distances of so many bits, "int8 bound" what no code of single values can beat.
        empty: output channels that are all zeros.
        time: what the zeros do to the time, in words.
    """

    layer: str
    pattern: str
    sparsity: float
    weights: int
    bytes: dict[str, int]
    empty: int
    time: str

    def smallest(self, kind: str) -> tuple[str, int]:
        """How the weights are stored in the fewest bytes, "float" or "int8"; the bound is no way to store."""
        ways = {name: size for name, size in self.bytes.items() if name.startswith(kind) and "bound" not in name}
        return min(ways.items(), key=lambda pair: pair[1])

    @property
    def buys(self) -> str:
        """ "nothing", "bytes" (in a file that codes zeros), or "bytes and, with a sparse kernel, time"."""
        fewer = self.smallest("int8")[1] < self.bytes["int8"]
        faster = not self.time.startswith(NOTHING)
        return " and, with a kernel for it, ".join(["bytes"] * fewer + ["time"] * faster) or "nothing"


NOTHING = "nothing"


def worth(model: nn.Module) -> list[Row]:
    """A row for each convolution and linear layer that has a mask, or zeros that learn; then one for all of them."""
    rows = []
    for path, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, _ConvNd | nn.Linear) or not isinstance(weight, Tensor):
            continue
        mask = mask_of(layer)
        constant = mask is None and not weight.requires_grad and weight.is_floating_point()
        if mask is not None or not (constant or bool(weight.all())):  # a shortcut's 0 and 1 nobody pruned
            rows.append(_row(path, layer, weight.detach(), mask.pattern if mask is not None else None))
    if rows:
        rows.append(_sum(rows))
    return rows


def _row(path: str, layer: Any, weight: Tensor, name: str | None) -> Row:
    pattern = parse(name or "weight")
    values = output_first(layer, weight)
    there = unit_sums((values != 0).double(), pattern) > 0
    inside = expand(there, tuple(values.shape), pattern)
    whole, stored = values.numel(), int(inside.sum())
    rounded = values
    if values.is_floating_point():
        scales = weight_scales(values, method="minmax").reshape(-1, *(1,) * (values.dim() - 1))
        rounded = quantize(values, scales, 0, -127, 127)
    float_bits = values.element_size() * 8 if values.is_floating_point() else 32
    sizes = {}
    for kind, bits in (("float", float_bits), ("int8", 8)):
        sizes[kind] = dense(whole, bits)
        sizes[f"{kind} bitmap"] = bitmap(there, stored, bits)
        for index in (4, 5):
            sizes[f"{kind} {index} bits"] = distances(there, stored, bits, index)
    sizes["int8 bound"] = bound(there, rounded[inside])
    sparsity = 1 - int(values.count_nonzero()) / whole
    empty = int((values.flatten(1) == 0).all(dim=1).sum())
    return Row(path or "the layer", name or "none", sparsity, whole, sizes, empty, time_of(pattern, sparsity))


def time_of(pattern: Pattern, sparsity: float) -> str:
    """What zeros of a pattern do to the time, in words; begins with "nothing" where no kernel is known that gains."""
    if sparsity == 0:
        return f"{NOTHING}: there are no zeros"
    if pattern.name == "filter":
        return f"{NOTHING} while they are masked; cut them with prune_channels, which every runtime gains from"
    if pattern.group is not None:
        if pattern.group == (2, 4):
            return "sparse tensor cores of NVIDIA GPUs (Ampere and later) only; no runtime on a CPU gains"
        return f"{NOTHING}: no runtime has a kernel for {pattern.name}"
    blocks = pattern.block is not None and pattern.block[0] % 16 == 0
    known = BLOCKS if blocks else SINGLE
    reached = [share for share in known if sparsity >= share - 0.005]
    none = "in ONNX Runtime and OpenVINO"
    if not reached:
        return f"{NOTHING} {none}, nor would a sparse kernel gain below {min(known):.0%} zeros"
    floats, integers = known[max(reached)]
    kernel = "a kernel for 16x1 blocks" if blocks else "a kernel for single weights"
    measured = f"{floats:.1f}x of dense float, {integers:.1f}x of dense int8 at {max(reached):.0%}"
    if blocks:
        return f"{kernel} ({measured}); nothing {none}"
    return f"{NOTHING} {none}; {kernel} was measured at {measured}"


def _sum(rows: Sequence[Row]) -> Row:
    weights = sum(row.weights for row in rows)
    sizes = {name: sum(row.bytes[name] for row in rows) for name in rows[0].bytes}
    patterns = sorted({row.pattern for row in rows})
    sparsity = sum(row.sparsity * row.weights for row in rows) / weights
    pattern = patterns[0] if len(patterns) == 1 else "mixed"
    time = (
        "see the layers" if pattern == "mixed" else time_of(parse("weight" if pattern == "none" else pattern), sparsity)
    )
    return Row("all", pattern, sparsity, weights, sizes, sum(row.empty for row in rows), time)


def _named(layers: Sequence[str]) -> str:
    return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")


def table(rows: Sequence[Row]) -> str:
    """The rows as text: a line for each layer, then what the zeros are worth, each thing said once, for the layers it
    holds for."""
    if not rows:
        return "no layer has zeros or a mask"
    width = max(len(row.layer) for row in rows)
    lines = [f"{'layer':{width}} pattern  zeros   KiB: float    coded     int8    coded    bound"]
    for row in rows:
        kib = [row.bytes["float"], row.smallest("float")[1], row.bytes["int8"], row.smallest("int8")[1]]
        numbers = " ".join(f"{size / 1024:8.1f}" for size in (*kib, row.bytes["int8 bound"]))
        lines.append(f"{row.layer:{width}} {row.pattern:8} {row.sparsity:5.1%}  {numbers:>47}")
    whole = rows[-1]
    lines += ["", f"zeros buy {whole.buys} (bytes only in a file that codes them: .onnx and .pt2 store zeros in full)"]
    said: dict[str, list[str]] = {}
    for row in rows[:-1]:
        said.setdefault(row.time, []).append(row.layer)
    lines += [f"time ({_named(layers)}): {time}" for time, layers in list(said.items())[:8]]
    if whole.empty:
        what = "1 output channel is" if whole.empty == 1 else f"{whole.empty} output channels are"
        lines.append(f"{what} all zeros: prune_channels would take out such channels for real")
    return "\n".join(lines)
