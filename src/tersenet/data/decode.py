"""Encoded images to 8-bit arrays of one size, and the cache of what was decoded.

Decoding CIFAR-10's 50,000 images takes longer than scoring a small network on them, so it is done once: the arrays lie
under `$TERSENET_CACHE`, else in the XDG cache folder, under a name made of what they came from. Images that cannot be
read are named; nothing is replaced by a blank.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.cache import cache_folder
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
        key: changes whenever the images do; None means that nothing is cached.
    """

    names: Sequence[str]
    read: Callable[[int], Any]
    labels: np.ndarray
    key: Any


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
    folder = _cached(encoded, preparation)
    found = _load(folder)
    if found is None:
        found = _decode(encoded, preparation, what, on_bad_image, quiet)
        _store(folder, found)
    if found.bad and on_bad_image == "stop":
        raise DataError(_unreadable(what, found.bad[0], ""))
    if found.bad:
        warnings.warn(f"{len(found.bad)} unreadable images of {what} were left out, first {found.bad[0]}", stacklevel=2)
    if len(found.images) == 0:
        raise DataError(f"{what} has no image that can be read (0 samples); give at least one")
    return found


def _decode(encoded: Encoded, preparation: Preparation, what: str, on_bad_image: str, quiet: bool) -> Decoded:
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
            bad.append(encoded.names[index])
            continue
        good.append(index)
    return Decoded(images[good] if bad else images, encoded.labels[good].astype(np.int64), tuple(bad))


def _unreadable(what: str, name: str, why: str) -> str:
    return (
        f"{name} of {what} is not an image that can be read{why}; mend or remove it, "
        "or skip such images (--on-bad-image skip)"
    )


def _cached(encoded: Encoded, preparation: Preparation) -> Path | None:
    if encoded.key is None:
        return None
    key = json.dumps([encoded.key, preparation.size, preparation.channels, "decoded 1"], sort_keys=True)
    return cache_folder() / "images" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _load(folder: Path | None) -> Decoded | None:
    if folder is None or not folder.is_dir():
        return None
    try:
        # "c": read on demand and never written back, so a large set need not fit into memory.
        images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        bad = tuple(json.loads((folder / "bad.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, EOFError):
        return None  # damaged: decoded and written again
    return Decoded(images, labels, bad) if len(images) == len(labels) else None


def _store(folder: Path | None, decoded: Decoded) -> None:
    """Written beside its place and renamed, so that a folder with the name is whole."""
    if folder is None:
        return
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
        np.save(scratch / "images.npy", decoded.images)
        np.save(scratch / "labels.npy", decoded.labels)
        (scratch / "bad.json").write_text(json.dumps(decoded.bad), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # only ever a damaged one
        scratch.rename(folder)
    except OSError as error:
        # A cache is a convenience: a full disk or a read-only home must not stop the work.
        warnings.warn(f"decoded images could not be cached in {folder.parent} ({error})", stacklevel=2)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
