"""The CIFAR ResNets of He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385, section 4.2).

Depth 6 n + 2: three stages of n basic blocks with 16, 32 and 64 channels. Shortcuts have no parameters ("option A":
subsample, pad with zeros on both sides). Parameter names are those of Yerlan Idelbayev's pytorch_resnet_cifar10
(BSD-2-Clause), whose published weights load as they are; nothing departs from the paper.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.shortcut import PadShortcut


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, I, H, W) -> (N, O, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            before = (outputs - inputs) // 2
            self.shortcut = PadShortcut(stride, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """(N, 3, H, W) images, 32x32 in the paper, to (N, num_classes) logits.

    Args:
        blocks: basic blocks in each of the three stages; (3, 3, 3) is ResNet-20.
        num_classes: outputs of the last layer.
    """

    def __init__(self, blocks: tuple[int, int, int] = (3, 3, 3), num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks[0], stride=1)
        self.layer2 = _stage(16, 32, blocks[1], stride=2)
        self.layer3 = _stage(32, 64, blocks[2], stride=2)
        self.linear = nn.Linear(64, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, 64)
        return self.linear(x)


def _stage(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(count - 1)))


def resnet20(num_classes: int = 10) -> CifarResNet:
    return CifarResNet((3, 3, 3), num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    return CifarResNet((5, 5, 5), num_classes)


def resnet44(num_classes: int = 10) -> CifarResNet:
    return CifarResNet((7, 7, 7), num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    return CifarResNet((9, 9, 9), num_classes)


def resnet110(num_classes: int = 10) -> CifarResNet:
    return CifarResNet((18, 18, 18), num_classes)
