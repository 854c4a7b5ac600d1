"""The values that ranges are chosen from: of every channel, whatever the layout and the sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tersenet import Quantize, Task
from tersenet.bricks.quantizer import Quantizer


class Tokens(nn.Module):
    """(N, C, T, 1) -> a linear layer on (N, T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2).transpose(1, 2).contiguous() + 0.5)


@pytest.mark.parametrize("channels", [120, 96, 30])
@pytest.mark.parametrize("wide", range(5))
def test_one_wide_channel_of_tokens_is_inside_of_the_range(channels: int, wide: int) -> None:
    """With a step of 3, 5 or 7 through 120 channels the same third, fifth or half of them would be all that is seen."""
    torch.manual_seed(0)
    model = Tokens(channels).eval()
    for tokens in (16, 40, 64):
        x = torch.randn(64, channels, tokens, 1)
        x[:, wide] *= 20
        task = Task(x[:2], calibrate=[x], quiet=True)
        quantized, _ = Quantize(samples=512).run(model, task)
        reach = max(module.reach[1] for module in quantized.modules() if isinstance(module, Quantizer))
        assert reach > 30, (tokens, reach)
