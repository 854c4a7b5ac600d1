from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tersenet.numerics.divergence import divergence


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_against_torch(temperature: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(7, 5), torch.randn(7, 5)
    p, q = F.log_softmax(b / temperature, 1), F.log_softmax(a / temperature, 1)
    expected = temperature**2 * float(F.kl_div(p, q, reduction="batchmean", log_target=True))
    assert divergence(a, b, temperature) == pytest.approx(expected, rel=1e-5)
    assert divergence(a, a) == 0.0


def test_all_numbers_of_a_sample_are_one_distribution() -> None:
    a, b = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    assert divergence(a, b) == divergence(a.flatten(1), b.flatten(1))
