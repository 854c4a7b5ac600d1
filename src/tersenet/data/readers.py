"""Where images come from: a folder per class, or scikit-learn's digits; `tables` has parquet files and the hub.

A reader finds the images and labels of each split and decodes nothing. Folders are read by a plain listing, because
Hugging Face `datasets` would copy the file names into a cache of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.data.classes import Labels, of_words, united, warn_of_numbers
from tersenet.data.decode import Encoded
from tersenet.data.image_cache import digest, digest_of_files
from tersenet.data.layout import SPLITS, SUFFIXES, folders_in, images_in, splits_in
from tersenet.errors import DataError, require

SPLIT_SEED = 20240229  # of splits that we make ourselves; it never changes, or scores could not be compared
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Found:
    """What a reader found: the images of each split ("train", "validate", "test") and the names of the classes."""

    splits: Mapping[str, Encoded]
    labels: tuple[str, ...]


def stratified(labels: np.ndarray, share: float = TEST_SHARE, seed: int = SPLIT_SEED) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (the rest, `share`), in ascending order, with the same share of every class, at least one of two."""
    generator = np.random.default_rng(seed)
    held = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(len(members) - 1, max(1, round(len(members) * share)))
        held.append(generator.permutation(members)[:count])
    test = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), test), test


def chosen(encoded: Encoded, index: np.ndarray) -> Encoded:
    """Some of the images."""
    key = encoded.key
    return Encoded(
        names=[encoded.names[i] for i in index],
        read=lambda i: encoded.read(int(index[i])),
        labels=encoded.labels[index],
        key=None if key is None else lambda: digest([key().encode(), index.astype("<i8").tobytes()]),
    )


def digits() -> Found:
    """scikit-learn's 1,797 handwritten digits (8x8, 17 greys), 80 % for training."""
    datasets = require("sklearn.datasets", "demo", "read the digits")
    bunch = datasets.load_digits()
    greys = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)

    def read(index: int) -> Any:
        return greys[index]

    whole = Encoded([f"digit {i}" for i in range(len(labels))], read, labels, None)
    train, test = stratified(labels)
    return Found({"train": chosen(whole, train), "test": chosen(whole, test)}, tuple("0123456789"))


def folder(root: Path, split: bool = True) -> Found:
    """A folder per class, either in `root` itself or in its folders train/, val/ and test/.

    Args:
        root: the folder.
        split: hold a fixed fifth of each class back as the test set where there are only class folders; without it all
            of them are the test set.
    Raises:
        DataError: when there is no such folder, no class, or no image in a class.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give a folder that holds a folder of images per class")
    places = splits_in(root)
    if not places:
        whole, labels = _classes(root, root)
        warn_of_numbers(labels.names, str(root))
        if not split:
            return Found({"test": whole}, labels.names)
        return Found(held_back(whole, str(root)), labels.names)
    read = {split: _classes(places[split], root) for split in SPLITS if split in places}
    read = with_test(read)
    parts, names = united({split: labels for split, (_, labels) in read.items()}, str(root))
    warn_of_numbers(names, str(root))
    return Found({split: replace(read[split][0], labels=parts[split].numbers) for split in read}, names)


def held_back(whole: Encoded, what: str) -> dict[str, Encoded]:
    """A fixed fifth of each class as the test set, the others for training. Raises DataError where none is left."""
    train, test = stratified(whole.labels)
    if len(test) == 0:
        raise DataError(
            f"{what} has no class of two images or more ({len(whole.labels)} in all), so that none can be held back "
            "for a test; add images, or give train/ and test/ yourself"
        )
    return {"train": chosen(whole, train), "test": chosen(whole, test)}


def with_test(found: dict[str, Any]) -> dict[str, Any]:
    """A validation set without a test set is the test set."""
    if "test" not in found and "validate" in found:
        found["test"] = found.pop("validate")
    return found


def _classes(place: Path, root: Path) -> tuple[Encoded, Labels]:
    """The images of one folder of class folders, which are numbered in alphabetical order."""
    folders = folders_in(place)
    if not folders:
        raise DataError(
            f"{place} has no class folders (0 samples); put the images of each class into a folder of its own"
        )
    paths: list[Path] = []
    words: list[str] = []
    for path in folders:
        images = images_in(path)
        if not images:
            raise DataError(
                f"the class folder {path} holds no images (0 samples); add some "
                f"({', '.join(sorted(SUFFIXES))}) or remove it"
            )
        paths += images
        words += [path.name] * len(images)
    labels = of_words(words)
    files = [str(file.relative_to(root)) for file in paths]
    key = functools.cache(lambda: digest_of_files(paths))
    return Encoded(files, paths.__getitem__, labels.numbers, key), labels
