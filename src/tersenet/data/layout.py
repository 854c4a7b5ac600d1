"""How a folder of images is laid out: class folders in it, or splits with class folders in them.

A class may be called "train" (of a railway), and a split "train" may stand beside folders that are no part of the
data; so it is what folders hold that decides, together with their names. What can be read in two ways is refused.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from tersenet.errors import DataError, InputWarning

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# The names of a split, as files and folders have them.
SPLITS = {"train": ("train", "training"), "validate": ("validation", "valid", "val"), "test": ("test", "testing")}


def folders_in(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """Image files anywhere below a folder, by their endings."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def split_of(name: str) -> str | None:
    """The split that a name stands for: "Train" is "train", "val" is "validate"."""
    return next((split for split, spellings in SPLITS.items() if name.lower() in spellings), None)


def splits_in(root: Path) -> dict[str, Path]:
    """{split: folder} where `root` holds splits; empty where it holds class folders.

    Raises:
        DataError: when the folders can be read in two ways, or two of them are the same split.
    """
    folders = folders_in(root)
    named = [path for path in folders if split_of(path.name)]
    places = [path for path in named if not _has_images(path) and _class_folders(path)]
    others = [path for path in folders if path not in named]
    if not named:
        return {}
    if not places:
        if others or any(not _has_images(path) for path in named):
            return {}  # class folders, one of which has the name of a split; or empty ones, which the reader names
        raise DataError(
            f"{root} holds {_names(named)} with images and no class folders in them; put the images of each class into "
            "a folder of its own, such as train/cat and train/dog"
        )
    bare = [path for path in named if path not in places]
    empty = next((path for path in bare if not _has_images(path)), None)
    if empty is not None:
        raise DataError(f"the folder {empty} holds no images (0 samples); add some or remove it")
    holding = [path for path in [*others, *bare] if _has_images(path) or _class_folders(path)]
    if holding and not _agree(places):
        raise DataError(
            f"{root} can be read in two ways: {_names(places)} may be the splits of the data, or class folders beside "
            f"{_names(holding)}; rename the class folder, or put the classes of each split into train/ and test/"
        )
    if holding:
        warnings.warn(
            f"{_names(holding)} in {root} is neither train, val nor test and is left out", InputWarning, stacklevel=3
        )
    found: dict[str, Path] = {}
    for path in places:
        split = split_of(path.name) or ""
        if split in found:
            raise DataError(f"{root} holds {_names([found[split], path])}, which mean the same split; keep one of them")
        found[split] = path
    return found


def _agree(places: Sequence[Path]) -> bool:
    """Whether there are two splits with a class in common, which leaves no doubt that they are splits."""
    classes = [{path.name for path in _class_folders(place)} for place in places]
    return len(classes) > 1 and bool(set.intersection(*classes))


def _class_folders(place: Path) -> list[Path]:
    """Folders in a folder that hold images somewhere."""
    return [path for path in folders_in(place) if _has_images(path, deep=True)]


def _has_images(folder: Path, deep: bool = False) -> bool:
    """Whether a folder holds an image file; stops at the first."""
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")] if deep else []
        if any(Path(at, name).suffix.lower() in SUFFIXES and not name.startswith(".") for name in files):
            return True
    return False


def _names(paths: Sequence[Path]) -> str:
    names = [f"{path.name}/" for path in paths[:4]]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
