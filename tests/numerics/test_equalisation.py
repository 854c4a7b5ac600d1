"""Equalised pairs compute the same and have equal ranges."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tersenet.numerics.equalisation import absorbed_bias, equalisation_factors, input_ranges, output_ranges


def test_two_layers_with_a_relu_between_give_the_same() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, 6, generator=source)
    first = torch.randn(5, 3, 3, 3, generator=source) * torch.logspace(-2, 2, 5).view(5, 1, 1, 1)
    bias, second = torch.randn(5, generator=source), torch.randn(4, 5, 1, 1, generator=source)
    factors = equalisation_factors(output_ranges(first), input_ranges(second))
    evened, read = first / factors.view(5, 1, 1, 1), second * factors.view(1, 5, 1, 1)
    before = F.conv2d(F.conv2d(x, first, bias).relu(), second)
    after = F.conv2d(F.conv2d(x, evened, bias / factors).relu(), read)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output_ranges(evened), input_ranges(read))
    torch.testing.assert_close(output_ranges(evened), (output_ranges(first) * input_ranges(second)).sqrt())


def test_ranges_of_grouped_layers() -> None:
    weight = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    found = input_ranges(weight, groups=3)
    assert found.shape == (6,)
    for i in range(6):
        readers = weight[2 * (i // 2) : 2 * (i // 2) + 2, i % 2]
        assert found[i] == readers.abs().max()
    depthwise = torch.randn(4, 1, 3, 3)
    assert torch.equal(input_ranges(depthwise, groups=4), output_ranges(depthwise))
    linear = torch.randn(3, 5)
    assert torch.equal(input_ranges(linear), linear.abs().amax(dim=0))


def test_dead_channels_are_left_and_factors_bounded() -> None:
    first, second = torch.tensor([0.0, 1.0, 1.0, 1e-30]), torch.tensor([1.0, 0.0, 4.0, 1e30])
    assert equalisation_factors(first, second).tolist() == [1.0, 1.0, 0.5, torch.tensor(1e-4).item()]


def test_what_the_next_bias_takes_over() -> None:
    c = absorbed_bias(torch.tensor([4.0, 1.0, -5.0]), torch.tensor([1.0, -1.0, 1.0]))
    assert c.tolist() == [1.0, 0.0, 0.0]
    z = torch.tensor([4.0, 2.0, 1.0])
    assert torch.equal(z.relu(), (z - c[0]).relu() + c[0])
