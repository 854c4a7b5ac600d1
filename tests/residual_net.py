"""A residual net that is small and has every kind of place that a search can pick: blocks that can go, one that cannot,
and two widths that share a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersenet.task import Task


class Plain(nn.Module):
    """x -> relu(f(x) + x) or, with a stride, + a projection of x."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """(N, 32, H, W) -> the same, through two layers of 16 channels: the second has both sites' channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(32, 16, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 32, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + x)


class Net(nn.Module):
    """(N, 3, 8, 8) -> (N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.first = Plain(16, 16)
        self.down = Plain(16, 32, stride=2)
        self.last = Bottleneck()
        self.linear = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = self.last(self.down(self.first(x)))
        return self.linear(x.mean(dim=(2, 3)))


def residual_net(seed: int = 0) -> nn.Module:
    """With settled norm statistics, as a trained one has."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        model = Net()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.running_mean, 0.0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def residual_task(model: nn.Module) -> Task:
    """With unlabelled images to calibrate on, and nothing else."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(32, 3, 8, 8, generator=generator) for _ in range(3)]
    return Task(example=images[0][:2], calibrate=images, original=model, quiet=True)
