"""One image of any mode to 8-bit pixels of one size and number of channels.

Files hold more than 8 bits in four ways: 16-bit and 32-bit whole numbers, floats, and arrays in tables. Which of their
values is white is nowhere written, so it is decided once for a whole set, from the smallest and largest value in it:
one dark image must not become bright. What fits no convention is refused, and never cut off at 255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersenet.errors import require
from tersenet.task import Preparation

MODES = {1: "L", 3: "RGB"}
_WIDE = ("I", "F")  # PIL's modes of more than 8 bits, "I;16" and its byte orders among them


@dataclass(frozen=True)
class Span:
    """The values of images of more than 8 bits: the smallest, the largest, and whether there are fractions."""

    low: float
    high: float
    fractions: bool

    def joined(self, other: Span | None) -> Span:
        if other is None:
            return self
        return Span(min(self.low, other.low), max(self.high, other.high), self.fractions or other.fractions)

    @property
    def white(self) -> float:
        """The value that is white: 1, 255 or 65535. Raises ValueError where no convention has such values."""
        if self.low < 0 or self.high > 65535 or (self.fractions and self.high > 255):
            raise ValueError(
                f"its set has values from {self.low:g} to {self.high:g}; whole numbers of 8 or 16 bits and floats in "
                "[0, 1] or [0, 255] are known"
            )
        if self.fractions and self.high <= 1:
            return 1.0
        return 255.0 if self.high <= 255 else 65535.0


def wide_values(image: Any) -> np.ndarray | None:
    """The values (H, W) or (H, W, C) of an image of more than 8 bits; None for any other. Raises ValueError for NaN."""
    if isinstance(image, np.ndarray):
        values = upright(image)
        if values.dtype == np.uint8:
            return None
    elif image.mode.startswith(_WIDE):
        values = np.asarray(image)
    else:
        return None
    if values.dtype.kind not in "iufb":
        raise ValueError(f"it holds {values.dtype}, which are no pixels")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it has NaN or infinite values")
    return values


def span_of(values: np.ndarray) -> Span:
    return Span(float(values.min()), float(values.max()), values.dtype.kind == "f")


def pixels(image: Any, preparation: Preparation, span: Span | None = None) -> np.ndarray:
    """(C, H, W) uint8 of a PIL image, or of an array, in the size and channels of `preparation`.

    An image is resized until its shorter side is size / crop, and its middle is cut out. Where crop is 1 and an image
    is smaller than the size one way, it is stretched to the size instead. The turn that a camera wrote down (EXIF) is
    made. Hidden colors of transparent pixels are kept, as torchvision does.

    Args:
        span: the values of its set, for images of more than 8 bits; the image's own where it stands alone.
    Raises:
        ValueError: when its values are of no known convention.
    """
    pillow = require("PIL.Image", "data", "decode images")
    if not isinstance(image, np.ndarray):
        image = require("PIL.ImageOps", "data", "decode images").exif_transpose(image)
    wide = wide_values(image)
    if wide is not None:
        image = _narrow(wide, span_of(wide) if span is None else span)
    if isinstance(image, np.ndarray):
        image = pillow.fromarray(np.ascontiguousarray(upright(image)))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    image = image.convert(MODES[preparation.channels])
    array = np.asarray(_sized(image, preparation), dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _sized(image: Any, preparation: Preparation) -> Any:
    """A PIL image of the preparation's size."""
    height, width = preparation.size
    if image.size == (width, height) and preparation.crop == 1:
        return image
    how = getattr(require("PIL.Image", "data", "resize images").Resampling, preparation.interpolation.upper())
    if preparation.crop == 1 and (image.width < width or image.height < height):
        return image.resize((width, height), how)
    # As timm and torchvision do, down to the rounding.
    least = math.floor(width / preparation.crop + 1e-6), math.floor(height / preparation.crop + 1e-6)
    scale = max(least[0] / image.width, least[1] / image.height)
    sides = (max(side, int(own * scale)) for side, own in zip(least, image.size, strict=True))
    image = image.resize(tuple(sides), how)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def is_grey(image: Any) -> bool:
    """Whether an image, or an array, has one channel, or equal ones."""
    if isinstance(image, np.ndarray):
        array = upright(image)
        return array.ndim == 2 or bool((array[..., :3] == array[..., :1]).all())
    if image.mode in ("1", "L", "LA", "La") or image.mode.startswith(_WIDE):
        return True
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    array = np.asarray(image.convert("RGB"))
    return bool((array == array[..., :1]).all())


def is_transparent(image: Any) -> bool:
    """Whether some pixel is not opaque."""
    if isinstance(image, np.ndarray):
        return False
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return "A" in image.getbands() and image.getchannel("A").getextrema()[0] < 255


def frames_of(image: Any) -> int:
    """How many pictures a file shows one after another, or on pages: 1 of most, and of an array. The second picture of
    a camera's file (MPO) is another view or a preview, which is no part of the data."""
    if isinstance(image, np.ndarray) or image.format == "MPO":
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # noqa: BLE001 - PIL's decoders raise many kinds; what was read of it is whole
        return 1


def _narrow(values: np.ndarray, span: Span) -> np.ndarray:
    white = span.white
    if white == 65535:
        return (values.astype(np.int64) >> 8).astype(np.uint8)
    return np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8)


def upright(array: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) of an array that may have its channels first. Raises ValueError for any other shape."""
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise ValueError(f"it is an array of shape {array.shape}, and (H, W), (H, W, C) or (C, H, W) are known")
    return array
