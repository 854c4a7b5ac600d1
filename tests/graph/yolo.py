"""A small network in the shape of YOLOv8: split, concat, pooling pyramid, upsample, three heads. A case, not a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Unit(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Split(nn.Module):
    """C2f: one convolution is split into two halves, one half goes on through bottlenecks, all parts are joined."""

    def __init__(self, inputs: int, outputs: int, depth: int, add: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.first = Unit(inputs, outputs, 1)
        self.last = Unit(half * (2 + depth), outputs, 1)
        self.inner = nn.ModuleList(nn.Sequential(Unit(half, half), Unit(half, half)) for _ in range(depth))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.inner:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.add else y)
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """SPPF: one pooling thrice, all joined."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = Unit(inputs, inputs // 2, 1), Unit(inputs * 2, outputs, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """(N, 3, H, W), H and W multiples of 32 -> three maps (N, 4 * bins + classes, H / 8, W / 8) and coarser."""

    def __init__(self, width: int = 16, classes: int = 20, bins: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(Unit(3, w, stride=2), Unit(w, 2 * w, stride=2), Split(2 * w, 2 * w, 1, True))
        self.p3 = nn.Sequential(Unit(2 * w, 4 * w, stride=2), Split(4 * w, 4 * w, 2, True))
        self.p4 = nn.Sequential(Unit(4 * w, 8 * w, stride=2), Split(8 * w, 8 * w, 2, True))
        self.p5 = nn.Sequential(Unit(8 * w, 16 * w, stride=2), Split(16 * w, 16 * w, 1, True), Pyramid(16 * w, 16 * w))
        self.up = nn.Upsample(scale_factor=2)
        self.up4, self.up3 = Split(24 * w, 8 * w, 1, False), Split(12 * w, 4 * w, 1, False)
        self.down3, self.down4 = Unit(4 * w, 4 * w, stride=2), Unit(8 * w, 8 * w, stride=2)
        self.out4, self.out5 = Split(12 * w, 8 * w, 1, False), Split(24 * w, 16 * w, 1, False)
        widths = (4 * w, 8 * w, 16 * w)
        self.boxes = nn.ModuleList(nn.Sequential(Unit(c, 4 * w), nn.Conv2d(4 * w, 4 * bins, 1)) for c in widths)
        self.scores = nn.ModuleList(nn.Sequential(Unit(c, 4 * w), nn.Conv2d(4 * w, classes, 1)) for c in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.up4(torch.cat([self.up(p5), p4], 1))
        n3 = self.up3(torch.cat([self.up(n4), p3], 1))
        n4 = self.out4(torch.cat([self.down3(n3), n4], 1))
        n5 = self.out5(torch.cat([self.down4(n4), p5], 1))
        levels = zip((n3, n4, n5), self.boxes, self.scores, strict=True)
        return [torch.cat([box(level), score(level)], 1) for level, box, score in levels]
