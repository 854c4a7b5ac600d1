"""Where images come from: a folder per class, parquet files, a data set of the Hugging Face hub, scikit-learn's digits.

A reader finds the images and labels of each split and decodes nothing. Tables are read by Hugging Face `datasets`;
folders by a plain listing, because `datasets` would copy the file names into a cache of its own.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.data.decode import Encoded
from tersenet.errors import DataError, require

IMAGE_COLUMNS = ("img", "image", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# The names of a split, as files and folders have them.
SPLITS = {"train": ("train", "training"), "validate": ("validation", "valid", "val"), "test": ("test", "testing")}
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
    return Encoded(
        names=[encoded.names[i] for i in index],
        read=lambda i: encoded.read(int(index[i])),
        labels=encoded.labels[index],
        key=None if encoded.key is None else [encoded.key, hashlib.sha256(index.astype("<i8").tobytes()).hexdigest()],
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
    places = _splits({path.name: path for path in _folders(root)})
    if not places:
        whole, names = _classes(root, root, None)
        if not split:
            return Found({"test": whole}, names)
        train, test = stratified(whole.labels)
        return Found({"train": chosen(whole, train), "test": chosen(whole, test)}, names)
    splits: dict[str, Encoded] = {}
    labels: tuple[str, ...] | None = None
    for name, place in sorted(places.items(), key=lambda item: list(SPLITS).index(item[0])):
        splits[name], names = _classes(place, root, labels)
        labels = names if labels is None else labels
    return Found(splits, labels or ())


def parquet(root: Path, columns: Sequence[str] | None = None) -> Found:
    """train*.parquet, test*.parquet and validation*.parquet, anywhere below `root`.

    Raises:
        DataError: when there is no such folder or file, or no column that fits.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give a folder with train*.parquet and test*.parquet")
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.parquet")):
        for split, names in SPLITS.items():
            if path.name.startswith(names):
                files.setdefault(split, []).append(path)
                break
    if not files:
        others = sum(1 for _ in root.rglob("*.parquet"))
        raise DataError(
            f"{root} has no parquet file that is named after its split ({others} of other names); "
            "name them train*.parquet, test*.parquet and validation*.parquet"
        )
    tables = {split: _read_parquet(paths) for split, paths in files.items()}
    keys = {split: [_stamp(path, root) for path in paths] for split, paths in files.items()}
    return _tables(tables, keys, columns, str(root))


def hub(name: str, columns: Sequence[str] | None = None) -> Found:
    """A data set of the Hugging Face hub, downloaded to that library's own cache.

    Raises:
        DataError: when it cannot be loaded, or has no column that fits.
    """
    datasets = require("datasets", "data", "read data of the hub")
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub, the network and the builders raise many kinds
        raise DataError(
            f"the data set {name!r} could not be loaded from the Hugging Face hub: {_first_line(error)}"
        ) from error
    places = _splits({str(split): split for split in loaded})
    if not places:
        raise DataError(f"the data set {name!r} has the splits {sorted(loaded)}; one must be named train or test")
    tables = {split: loaded[place] for split, place in places.items()}
    keys = {split: [name, table._fingerprint] for split, table in tables.items()}
    return _tables(tables, keys, columns, name)


def _splits(names: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries that are named after a split. A validation set without a test set is the test set."""
    found = {split: names[name] for split, spellings in SPLITS.items() for name in reversed(spellings) if name in names}
    return _with_test(found)


def _with_test(found: dict[str, Any]) -> dict[str, Any]:
    if "test" not in found and "validate" in found:
        found["test"] = found.pop("validate")
    return found


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes(place: Path, root: Path, labels: tuple[str, ...] | None) -> tuple[Encoded, tuple[str, ...]]:
    """The images of one folder of class folders. `labels` are those of the training set, which must hold all others."""
    folders = _folders(place)
    if not folders:
        raise DataError(
            f"{place} has no class folders (0 samples); put the images of each class into a folder of its own"
        )
    names = tuple(path.name for path in folders)
    if labels is not None and not set(names) <= set(labels):
        raise DataError(
            f"{place} has the class {sorted(set(names) - set(labels))[0]!r}, which the training set has not; "
            f"it has {', '.join(labels[:10])}"
        )
    paths, numbers = [], []
    for path in folders:
        images = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        )
        if not images:
            raise DataError(
                f"the class folder {path} holds no images (0 samples); add some "
                f"({', '.join(sorted(SUFFIXES))}) or remove it"
            )
        paths += images
        numbers += [(labels or names).index(path.name)] * len(images)
    files = [str(file.relative_to(root)) for file in paths]
    key = ["folder", [_stamp(file, root) for file in paths]]
    return Encoded(files, paths.__getitem__, np.asarray(numbers, np.int64), key), labels or names


def _stamp(path: Path, root: Path) -> list[Any]:
    status = path.stat()
    return [str(path.relative_to(root)), status.st_size, status.st_mtime_ns]


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    """`datasets` shows bars of its own; ours comes with the decoding."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_parquet(paths: Sequence[Path]) -> Any:
    """A table in memory: `datasets` keeps a copy on disk, which goes away again because we cache what is decoded."""
    datasets = require("datasets", "data", "read parquet files")
    try:
        with tempfile.TemporaryDirectory(prefix="tersenet-") as scratch, _without_bars(datasets):
            return datasets.load_dataset(
                "parquet",
                data_files=[str(path) for path in paths],
                split="train",
                cache_dir=scratch,
                keep_in_memory=True,
            )
    except Exception as error:  # pyarrow and the builders raise many kinds on damaged files
        files, said = ", ".join(map(str, paths)), _first_line(error.__cause__ or error)
        if "corresponds to no data" in said:  # how `datasets` says that a table has no rows
            raise DataError(f"{files} is empty (0 samples); give at least one image") from error
        raise DataError(f"{files} cannot be read as parquet: {said}") from error


def _tables(tables: Mapping[str, Any], keys: Mapping[str, Any], columns: Sequence[str] | None, what: str) -> Found:
    """Images and labels of tables, one per split; classes are those of the training table."""
    tables = _with_test(dict(tables))
    splits: dict[str, Encoded] = {}
    labels: tuple[str, ...] = ()
    for split in sorted(tables, key=list(SPLITS).index):
        table = tables[split]
        image, label = _columns(table, columns, what)
        names, numbers = _labels(table, label, labels, f"{split} set of {what}")
        if labels and names and names != labels:
            raise DataError(
                f"the {split} set of {what} has the classes {names[:10]}, but another set has {labels[:10]}"
            )
        labels = labels or names
        source = _images(table.select_columns([image]), image)
        rows = [f"row {row} of {split}" for row in range(len(table))]
        key = keys.get(split, keys.get("validate"))
        splits[split] = Encoded(rows, source, numbers, ["table", key, image, label])
    return Found(splits, labels)


def _columns(table: Any, wanted: Sequence[str] | None, what: str) -> tuple[str, str]:
    """The names of the image and the label column: those asked for, or found by type and by name."""
    datasets = require("datasets", "data", "read tables")
    present = f"its columns are {', '.join(table.column_names)}"
    if wanted is not None:
        missing = [name for name in wanted if name not in table.column_names]
        if len(wanted) != 2 or missing:
            raise DataError(f"{what} has no columns {', '.join(missing or wanted)!r} for image and label; {present}")
        return wanted[0], wanted[1]
    typed = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    image = next((name for name in (*IMAGE_COLUMNS, *typed) if name in table.column_names), None)
    classed = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    label = next((name for name in (*LABEL_COLUMNS, *classed) if name in table.column_names), None)
    if image is None or label is None:
        lacking = "image" if image is None else "label"
        raise DataError(
            f"{what} has no {lacking} column that can be told by name or type; {present}; name them with columns"
        )
    return image, label


def _images(table: Any, column: str) -> Any:
    """index -> bytes or path of the image in a row."""
    datasets = require("datasets", "data", "read tables")
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))

    def read(index: int) -> Any:
        cell = table[index][column]
        if isinstance(cell, dict):
            return cell["bytes"] if cell.get("bytes") is not None else cell["path"]
        return cell

    return read


def _labels(table: Any, column: str, known: tuple[str, ...], what: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and class numbers (N,). Words are numbered in alphabetical order, or as the training set has them."""
    kind = table.features[column]
    values = np.asarray(table.with_format("numpy", columns=[column])[:][column])
    if len(values) == 0:
        raise DataError(f"the {what} is empty (0 samples); give at least one image")
    if values.dtype.kind in "US" or values.dtype == object:
        names = known or tuple(sorted({str(value) for value in values}))
        position = {name: number for number, name in enumerate(names)}
        new = sorted({str(value) for value in values} - set(names))
        if new:
            raise DataError(
                f"the {what} has the label {new[0]!r}, which the training set has not; it has {', '.join(names[:10])}"
            )
        return names, np.asarray([position[str(value)] for value in values], np.int64)
    if values.dtype.kind not in "iub" or values.ndim != 1:
        raise DataError(
            f"column {column!r} of the {what} holds {values.dtype}, but labels must be whole numbers or words"
        )
    return tuple(getattr(kind, "names", None) or ()), values.astype(np.int64)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
