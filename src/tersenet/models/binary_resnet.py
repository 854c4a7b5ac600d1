"""A residual network of binary weights and activations for 32x32 images.

After Bi-Real Net (Liu et al., arXiv:1808.00278) and ReActNet (Liu et al., arXiv:2003.03488): every convolution has a
shortcut of its own, around it and its norm, so that real values reach the end; activations are signs with learned
shifts, and RPReLU stands behind each addition. First and last layer are float. Departures: a shortcut to more channels
is the average of 2x2 pixels, twice, side by side, instead of a float 1x1 convolution, so that no float weights are
added; depth and stages are those of the CIFAR ResNets (arXiv:1512.03385, section 4.2), wider.

It is made for two-stage training: at first weights are real (rule `real`), and the step `binarise` makes them binary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.binary import BinaryConv2d, ShiftedPReLU, Sign
from tersenet.bricks.few_bits import FewBitConv2d


class BinaryBlock(nn.Module):
    """One binary convolution and its shortcut: (N, I, H, W) -> (N, O, H / stride, W / stride); O is I or 2 I."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        conv = FewBitConv2d(inputs, outputs, 3, stride, padding=1, bias=False, rule="real", bits=1)
        self.conv = BinaryConv2d(Sign(inputs), conv)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = ShiftedPReLU(outputs)
        self.stride, self.doubled = stride, outputs != inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.stride == 1 else F.avg_pool2d(x, 2)
        if self.doubled:
            shortcut = torch.cat([shortcut, shortcut], dim=1)
        return self.act(self.bn(self.conv(x)) + shortcut)


class BinaryResNet(nn.Module):
    """(N, 3, H, W) images, H and W multiples of 4, to (N, num_classes) logits.

    Args:
        width: channels of the first stage; the others have two and four times as many.
        blocks: binary convolutions in each of the three stages.
        num_classes: outputs of the last layer.
    """

    def __init__(self, width: int = 32, blocks: int = 6, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        inputs = width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                stages.append(BinaryBlock(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.linear = nn.Linear(inputs, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bn1(self.conv1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def binary_resnet20(num_classes: int = 10, width: int = 32) -> BinaryResNet:
    return BinaryResNet(width, 6, num_classes)
