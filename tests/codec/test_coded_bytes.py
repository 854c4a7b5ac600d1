"""What a tensor will cost is what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersenet.codec import container, estimate


def weights(step: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(40, 1, 1, 1, generator=generator) + 0.2
    return (torch.randn(40, 20, 3, 3, generator=generator) * scale / step).round() * step


def test_the_bytes_are_those_of_the_file() -> None:
    for tensor in (weights(), weights().half(), torch.randn(7, 5), torch.arange(5), torch.zeros(0), -torch.zeros(9)):
        file = container.pack({}, {"w": tensor + 0.0 if tensor.is_floating_point() else tensor})
        head = int.from_bytes(file[16:20], "little")
        assert estimate.coded_bytes(tensor) == len(file) - 28 - 32 - head


def test_the_lengths_of_what_is_there_come_close_to_the_file() -> None:
    q = weights(0.5).div(0.5).int().numpy()
    lengths = estimate.code_lengths(q)
    assert lengths.contexts.shape == q.shape
    assert 0.97 < lengths.of(q).sum() / 8 / estimate.coded_bytes(weights(0.5)) < 1.0
    assert np.allclose(np.exp2(-lengths.bits.astype(np.float64)).sum(1), 1, atol=1e-5)


def test_zero_is_cheaper_where_all_around_is_zero() -> None:
    q = np.zeros((32, 16, 3, 3), np.int32)
    q[16:] = np.random.default_rng(0).integers(-4, 5, (16, 16, 3, 3))
    lengths = estimate.code_lengths(q)
    zero, four = -lengths.low, 4 - lengths.low
    quiet, loud = lengths.bits[lengths.contexts[2:16]], lengths.bits[lengths.contexts[18:]]
    assert quiet[..., zero].mean() < 0.5 < 2 < loud[..., zero].mean()
    assert quiet[..., four].mean() > loud[..., four].mean() + 2


def test_what_looks_like_its_neighbours_is_cheaper() -> None:
    """All but one kernel number is 3: there 3 costs less than -3, and the other way round where all are -3."""
    q = np.random.default_rng(0).normal(0, 1, (40, 30, 1, 1)).repeat(3, 2).repeat(3, 3)
    q = np.rint(q * 2 + np.random.default_rng(1).normal(0, 0.3, q.shape)).clip(-6, 6).astype(np.int32)
    q[3, 4], q[5, 6] = 3, -3
    lengths = estimate.code_lengths(q)
    column = np.arange(-3, 4) - lengths.low
    high, low = lengths.bits[lengths.contexts[3, 4, 0, 0], column], lengths.bits[lengths.contexts[5, 6, 0, 0], column]
    assert high[-1] < high[0] - 3
    assert low[0] < low[-1] - 3


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="at most 255"):
        estimate.code_lengths(np.array([255], np.int32))
    with pytest.raises(ValueError, match="complex64"):
        estimate.coded_bytes(torch.zeros(2, dtype=torch.complex64))
