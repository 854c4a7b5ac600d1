"""What zeros are worth: sizes against counts by hand, and zeros that buy nothing called so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tersenet.bricks.settle import settle
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.pruning.worth import table, worth
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

TASK = Task(example=torch.zeros(2, 16, 5, 5))


def masked(pattern: str, sparsity: float | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 1)).eval()
    return PruneWeights(pattern=pattern, sparsity=sparsity).run(model, TASK)[0]


def test_sizes_of_single_weights() -> None:
    first, second, whole = worth(masked("weight", 0.75))
    assert (first.layer, second.layer, whole.layer) == ("0", "1", "all")
    assert first.weights == 32 * 16 * 9
    assert first.bytes["float"] == 4 * 4608
    assert first.bytes["float bitmap"] == 4608 // 8 + 1152 * 4
    assert first.bytes["int8"] == 4608
    assert first.bytes["int8 bitmap"] == 4608 // 8 + 1152
    assert first.bytes["int8 bound"] < first.bytes["int8 bitmap"]
    assert whole.bytes["int8"] == first.bytes["int8"] + second.bytes["int8"]
    assert whole.sparsity == 0.75


def test_blocks_need_a_bit_for_sixteen_weights() -> None:
    first = worth(masked("16x1", 0.75))[0]
    assert first.bytes["int8 bitmap"] == 4608 // 16 // 8 + 1152


@pytest.mark.parametrize(
    ("pattern", "sparsity", "buys", "said"),
    [
        ("weight", 0.05, "nothing", "gain below 70% zeros"),
        ("weight", 0.9, "bytes", "a kernel for single weights was measured at 3.7x"),
        ("kernel", 0.9, "bytes", "nothing in ONNX Runtime"),
        ("16x1", 0.9, "bytes and, with a kernel for it, time", "6.2x of dense float, 1.8x of dense int8 at 90%"),
        ("16x1", 0.3, "bytes", "gain below 50% zeros"),
        ("8x8", 0.9, "bytes", "nothing in ONNX Runtime"),
        ("2:4", None, "bytes and, with a kernel for it, time", "NVIDIA"),
        ("1:4", None, "bytes", "no runtime has a kernel for 1:4"),
        ("filter", 0.5, "bytes", "cut them with prune_channels"),
    ],
)  # fmt: skip
def test_zeros_that_buy_nothing_are_called_so(pattern: str, sparsity: float | None, buys: str, said: str) -> None:
    rows = worth(masked(pattern, sparsity))
    assert rows[0].buys == buys
    assert said in rows[0].time
    assert f"zeros buy {rows[-1].buys}" in table(rows)


def test_empty_channels_are_counted() -> None:
    rows = worth(masked("filter", 0.5))
    assert rows[0].empty == 16
    assert "24 output channels are all zeros" in table(rows)
    assert f"time (0, 1): {rows[0].time}" in table(rows)
    many = [*(replace(rows[0], layer=name) for name in "abcd"), rows[-1]]
    assert f"time (a, b, c and 1 more): {rows[0].time}" in table(many)


def test_zeros_are_seen_without_a_mask_and_in_integers() -> None:
    model = masked("weight", 0.75)
    assert [row.pattern for row in worth(settle(model))] == ["none"] * 3
    quantized = settle(Quantize(activations=None).run(masked("weight", 0.75), TASK)[0])
    row = worth(quantized)[0]
    assert row.bytes["int8"] == 4608
    assert row.sparsity >= 0.75  # small weights round to zero as well


def test_a_model_without_zeros_has_nothing_to_say() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3))
    assert worth(model) == []
    assert table([]) == "no layer has zeros or a mask"


def test_several_patterns_are_called_mixed() -> None:
    model = masked("16x1", 0.5)
    model, _ = PruneWeights(pattern="weight", sparsity=0.5, only=("1",)).run(model, TASK)
    assert worth(model)[-1].pattern == "mixed"
