"""A small network for scikit-learn's 8x8 digits, the model of the demonstration. It is our own design.

Few and wide layers, because at one image a call a runtime's cost per layer would otherwise hide what compression
gains: 4.7 million multiply-adds in three convolutions, of which the wide pair between stem and residual add is there
to be pruned and rounded.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DigitsNet(nn.Module):
    """(N, 1, 8, 8) images to (N, num_classes) logits.

    Args:
        num_classes: outputs of the last layer.
        channels: of the residual stream.
        hidden: between the two convolutions of the residual block.
    """

    def __init__(self, num_classes: int = 10, channels: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(x + self.bn3(self.conv3(out)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, channels)
        return self.linear(x)


def digits(num_classes: int = 10) -> DigitsNet:
    return DigitsNet(num_classes)
