"""Two tiny networks with all that int8 has to get right, which the tests of several runtimes share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.shortcut import PadShortcut
from tersenet.task import Task

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
TASK = Task(example=X[:2], calibrate=[(X, torch.zeros(6))], quiet=True)


class Residual(nn.Module):
    """All that the CIFAR ResNets have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut, self.linear = PadShortcut(2, 2, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + self.shortcut(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Mobile(nn.Module):
    """Depthwise convolution, ReLU6, concatenation of values bounded alike and not, pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(16, 8, 1)
        self.hidden, self.last = nn.Linear(96, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.conv(x)))
        x = torch.cat([x, F.relu6(self.depthwise(x))], 1)
        x = torch.cat([x, self.point(x)], 1)
        x = F.avg_pool2d(F.max_pool2d(x, 2), 2)
        return self.last(F.relu(self.hidden(x.flatten(1))))


def lively(model: nn.Module) -> nn.Module:
    """Weights of usual sizes and statistics that are not those of a fresh norm."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()
