"""Images of another size.

Bilinear with a filter that is as wide as the step from pixel to pixel, so that what is made smaller does not alias;
libraries that read images do the same (Pillow's `resize` with BILINEAR).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) as (N, C, *size); images of that size are handed back as they are.

    Commutes with a mean and a deviation per channel, so that prepared images may be resized.
    """
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
