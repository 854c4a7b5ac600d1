"""Encoded images to 8-bit arrays of one size.

Decoding CIFAR-10's 50,000 images takes longer than scoring a small network on them, so it is done once: `image_cache`
keeps the arrays. Images that cannot be read are named; nothing is replaced by a blank.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.data import image_cache
from tersenet.data.image_cache import Pixels
from tersenet.errors import DataError, SettingsError, require
from tersenet.task import Preparation

MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Encoded:
    """Images as they are stored.

    Args:
        names: what to call each image in a message: its file, or its row.
        read: index -> a path, or the bytes of a file (for the digits: an array).
        labels: (N,) class numbers.
        key: a hash of the images' bytes, made when it is asked for; None means that nothing is cached.
    """

    names: Sequence[str]
    read: Callable[[int], Any]
    labels: np.ndarray
    key: Callable[[], str] | None


@dataclass(frozen=True)
class Decoded:
    """images (N, C, H, W) uint8, labels (N,) int64, and the names of the images that were left out."""

    images: np.ndarray
    labels: np.ndarray
    bad: tuple[str, ...]


def pixels(image: Any, preparation: Preparation) -> np.ndarray:
    """(C, H, W) uint8 of a PIL image, in the size and channels of `preparation`.

    An image that is at least as large both ways is scaled until it just covers the size, and its middle is cut out;
    any other is stretched to the size. Both are bilinear. The turn that a camera wrote down (EXIF) is made.
    """
    pillow = require("PIL.Image", "data", "decode images")
    image = require("PIL.ImageOps", "data", "decode images").exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would cut 16-bit greys off at 255
        image = pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    image = image.convert(MODES[preparation.channels])
    height, width = preparation.size
    if image.size != (width, height):
        if image.width >= width and image.height >= height:
            scale = max(width / image.width, height / image.height)
            image = image.resize(
                (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
                pillow.Resampling.BILINEAR,
            )
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        else:
            image = image.resize((width, height), pillow.Resampling.BILINEAR)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def decode(
    encoded: Encoded, preparation: Preparation, what: str, on_bad_image: str = "stop", quiet: bool = False
) -> Decoded:
    """Decodes all images, or reads them from the cache.

    Args:
        encoded: the images.
        preparation: size and channels.
        what: the data in words, for messages and the progress bar.
        on_bad_image: "stop" raises at the first image that cannot be read; "skip" leaves it out and warns once.
        quiet: no progress bar (it is on standard error).
    Raises:
        DataError: for an image that cannot be read, when no image is left, or for channels other than 1 and 3.
        SettingsError: for another `on_bad_image`.
    """
    if on_bad_image not in ("stop", "skip"):
        raise SettingsError(f"on_bad_image must be 'stop' or 'skip', got {on_bad_image!r}")
    if preparation.channels not in MODES:
        raise DataError(f"images are read with 1 or 3 channels, but the preparation has {preparation.channels}")
    place = None if encoded.key is None else image_cache.place_of(encoded.key(), preparation.size, preparation.channels)
    found = None if place is None else image_cache.load(place, len(encoded.names))
    if found is None:
        found = _decode(encoded, preparation, what, on_bad_image, quiet)
        if place is not None:
            image_cache.store(place, found)
    bad = tuple(encoded.names[index] for index in found.bad)
    if bad and on_bad_image == "stop":
        raise DataError(_unreadable(what, bad[0], ""))
    if bad:
        warnings.warn(f"{len(bad)} unreadable images of {what} were left out, first {bad[0]}", stacklevel=2)
    if len(found.images) == 0:
        raise DataError(f"{what} has no image that can be read (0 samples); give at least one")
    return Decoded(found.images, np.delete(encoded.labels, np.asarray(found.bad, np.int64)).astype(np.int64), bad)


def _decode(encoded: Encoded, preparation: Preparation, what: str, on_bad_image: str, quiet: bool) -> Pixels:
    from rich.console import Console
    from rich.progress import track

    pillow = require("PIL.Image", "data", "decode images")
    count = len(encoded.names)
    images = np.empty((count, preparation.channels, *preparation.size), np.uint8)
    good, bad = [], []
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal  # a log would get an empty line of it
    numbers = track(range(count), f"decoding {what}", console=console, transient=True, disable=hidden)
    for index in numbers:
        try:
            source = encoded.read(index)
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            images[index] = pixels(pillow.open(io.BytesIO(data)), preparation)
        except Exception as error:  # PIL's decoders raise many kinds on damaged files
            if on_bad_image == "stop":
                # PIL would tell the address of the bytes in memory.
                why = "" if isinstance(error, pillow.UnidentifiedImageError) else f" ({error})"
                raise DataError(_unreadable(what, encoded.names[index], why)) from error
            bad.append(index)
            continue
        good.append(index)
    return Pixels(images[good] if bad else images, tuple(bad))


def _unreadable(what: str, name: str, why: str) -> str:
    return (
        f"{name} of {what} is not an image that can be read{why}; mend or remove it, "
        "or skip such images (--on-bad-image skip)"
    )
