"""MobileNetV2 of Sandler et al., "Inverted Residuals and Linear Bottlenecks" (arXiv:1801.04381).

Parameter names, layer order and initial values are torchvision's (BSD-3-Clause), so its published weights load as they
are. As there, and unlike in the paper, no 1x1 expansion is spent where the expansion factor is 1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.errors import ModelError

# Table 2 of the paper: expansion factor, channels at width 1, repeats, stride of the first.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project: (N, I, H, W) -> (N, O, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_conv_bn_relu6(inputs, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """(N, 3, H, W) images, 224x224 in the paper, to (N, num_classes) logits.

    Args:
        num_classes: outputs of the last layer.
        width: multiplies the channels of every layer; the last convolution never gets fewer than 1280, as in the paper.
        small_images: for 32x32 images the first convolution and the second stage do not halve them, so that 4x4 pixels
            are left at the end and not one.
    Raises:
        ModelError: when width is not positive.
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0, small_images: bool = False) -> None:
        super().__init__()
        if not width > 0:
            raise ModelError(f"width must be positive, got {width}; 1.0 is the paper's network")
        channels = nearest_multiple(32 * width)
        features: list[nn.Module] = [_conv_bn_relu6(3, channels, 3, stride=1 if small_images else 2)]
        for number, (expansion, outputs, repeats, stride) in enumerate(_STAGES):
            stride = 1 if small_images and number == 1 else stride
            for i in range(repeats):
                after = nearest_multiple(outputs * width)
                features.append(InvertedResidual(channels, after, stride if i == 0 else 1, expansion))
                channels = after
        last = nearest_multiple(1280 * max(1.0, width))
        features.append(_conv_bn_relu6(channels, last, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.classifier(x)


def nearest_multiple(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, but never less than 90 % of `channels`: how the paper's authors round widths.

    >>> nearest_multiple(24), nearest_multiple(18), nearest_multiple(12)
    (24, 24, 16)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


def mobilenet_v2(num_classes: int = 1000, width: float = 1.0) -> MobileNetV2:
    return MobileNetV2(num_classes, width)


def mobilenet_v2_cifar(num_classes: int = 10, width: float = 1.0) -> MobileNetV2:
    return MobileNetV2(num_classes, width, small_images=True)


def mobilenet_v2_cifar_half(num_classes: int = 10) -> MobileNetV2:
    return mobilenet_v2_cifar(num_classes, width=0.5)
