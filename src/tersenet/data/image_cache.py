"""The cache of decoded images: pixels only, under a name made of the bytes that they were decoded from.

Sizes and times of files do not tell two data sets apart (archives restore both), so the key is a hash of the images'
own bytes, of the preparation and of the decoder. Labels, names and folders are no part of it: they come from the
data each time, so that a class that was added cannot move the labels of images that were decoded before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.cache import cache_folder
from tersenet.errors import require
from tersenet.task import Preparation

# Changes whenever `decode` makes other pixels of the same bytes, or says something else of them.
DECODER = "decoded 5: turned by EXIF, covering, middle cut out"


@dataclass(frozen=True)
class Pixels:
    """Decoded images.

    Args:
        images: (N, C, H, W) uint8.
        bad: indices of the images that were left out, among all that were read.
        facts: what was seen while decoding, for messages: counts and values by name.
    """

    images: np.ndarray
    bad: tuple[int, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def digest(chunks: Iterable[bytes]) -> str:
    """One hash of several byte strings in their order; where one ends and the next begins counts."""
    whole = hashlib.sha256()
    for chunk in chunks:
        whole.update(hashlib.sha256(chunk).digest())
    return whole.hexdigest()


def digest_of_files(paths: Iterable[Path]) -> str:
    """One hash of the contents of files in their order. A file that cannot be read counts as such."""

    def contents() -> Iterable[bytes]:
        for path in paths:
            try:
                with open(path, "rb", buffering=0) as file:
                    yield file.read()
            except OSError as error:
                yield f"unreadable: {error.errno}".encode()

    return digest(contents())


def place_of(key: str, preparation: Preparation) -> Path:
    """The folder for images of these bytes in this size, number of channels, interpolation and crop."""
    pillow = require("PIL", "data", "decode images")
    features = require("PIL.features", "data", "decode images")
    decoder = [DECODER, pillow.__version__, features.version("jpg"), features.version("webp")]
    resizing = [preparation.interpolation, preparation.crop]
    text = json.dumps([key, list(preparation.size), preparation.channels, resizing, decoder])
    return cache_folder() / "images" / hashlib.sha256(text.encode()).hexdigest()[:32]


def load(folder: Path, count: int) -> Pixels | None:
    """What was stored for `count` images; None where there is nothing, or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        # "c": read on demand and never written back, so a large set need not fit into memory.
        images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
        seen = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
        found = Pixels(images, tuple(seen["bad"]), dict(seen["facts"]))
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None  # damaged: decoded and written again
    return found if len(images) + len(found.bad) == count else None


def store(folder: Path, pixels: Pixels) -> None:
    """Written beside its place and renamed, so that a folder with the name is whole."""
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
        np.save(scratch / "images.npy", pixels.images)
        seen = {"bad": pixels.bad, "facts": pixels.facts}
        (scratch / "seen.json").write_text(json.dumps(seen), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # only ever a damaged one
        scratch.rename(folder)
    except OSError as error:
        # A cache is a convenience: a full disk or a read-only home must not stop the work.
        warnings.warn(f"decoded images could not be cached in {folder.parent} ({error})", stacklevel=2)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
