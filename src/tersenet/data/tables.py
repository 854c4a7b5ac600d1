"""Images and labels of tables: parquet files, and data sets of the Hugging Face hub, read by its `datasets`.

An image may be stored as its file's bytes, as a path, or as an array of numbers; a label as a number, a word, a
ClassLabel, a truth value, or a row of zeros with one 1. What is missing or means something else is refused by its row.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.data.classes import Labels, listed, united
from tersenet.data.decode import Encoded
from tersenet.data.image_cache import digest, digest_of_files
from tersenet.data.layout import SPLITS, split_of
from tersenet.data.readers import Found, with_test
from tersenet.errors import DataError, InputWarning, require

IMAGE_COLUMNS = ("img", "image", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def parquet(root: Path, columns: Sequence[str] | None = None) -> Found:
    """Parquet files anywhere below `root`, named after their split (train*.parquet) or in a folder of its name.

    Raises:
        DataError: when there is no such folder or file, or no column that fits.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give a folder with train*.parquet and test*.parquet")
    files: dict[str, list[Path]] = {}
    others = []
    for path in sorted(root.rglob("*.parquet")):
        split = _split_of_file(path.relative_to(root))
        files.setdefault(split, []).append(path) if split else others.append(path.name)
    if not files:
        raise DataError(
            f"{root} has no parquet file that is named after its split ({len(others)} of other names); "
            "name them train*.parquet, test*.parquet and validation*.parquet"
        )
    if others:
        warnings.warn(
            f"{len(others)} parquet files of {root} are not named after a split and are left out ({listed(others)})",
            InputWarning,
            stacklevel=3,
        )
    tables = {split: _read_parquet(paths) for split, paths in files.items()}
    return _found(tables, columns, str(root), root)


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
    tables = {split: loaded[place] for place in reversed(list(loaded)) if (split := split_of(str(place)))}
    if not tables:
        raise DataError(f"the data set {name!r} has the splits {sorted(loaded)}; one must be named train or test")
    return _found(tables, columns, name)


def _split_of_file(path: Path) -> str | None:
    """The split that a word of the file's name stands for, else one of the folders around it, the nearest first."""
    for part in (path.stem, *(parent.name for parent in path.parents)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if split := split_of(word):
                return split
    return None


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


def _found(tables: Mapping[str, Any], columns: Sequence[str] | None, what: str, root: Path | None = None) -> Found:
    """Images and labels of tables, one per split."""
    tables = with_test({split: tables[split] for split in SPLITS if split in tables})
    places = {split: _columns(table, columns, what) for split, table in tables.items()}
    parts, names = united(
        {split: _labels(table, places[split][1], f"{split} set of {what}") for split, table in tables.items()}, what
    )
    splits = {}
    for split, table in tables.items():
        read, key = _images(table, places[split][0], root)
        rows = [f"row {row} of {split}" for row in range(len(table))]
        splits[split] = Encoded(rows, read, parts[split].numbers, key)
    return Found(splits, names)


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
            f"{what} has no {lacking} column that can be told by name or type; {present}; name both with "
            "--columns IMAGE,LABEL"
        )
    return image, label


def _images(table: Any, column: str, root: Path | None) -> tuple[Callable[[int], Any], Callable[[], str]]:
    """index -> the bytes, the path or the array of the image in a row; and the hash of all of them."""
    datasets = require("datasets", "data", "read tables")
    table = table.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    kind = table.features[column]
    encoded = isinstance(kind, dict | datasets.Image | datasets.Value)
    if not encoded:  # nested lists of numbers; bytes would lose their last zeros in this format
        table = table.with_format("numpy")

    def read(index: int) -> Any:
        cell = table[index][column]
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
        if cell is None:
            raise ValueError("the cell is empty")
        if isinstance(cell, str):
            return root / cell if root is not None and (root / cell).is_file() else Path(cell)
        return cell

    def key() -> str:
        outside = []
        if encoded:
            cells = (_path_of(cell) for cell in table[:][column])
            outside = [read(index) for index, path in enumerate(cells) if path is not None]
        return digest([_digest_of_column(table).encode(), digest_of_files(outside).encode()])

    return read, key


def _path_of(cell: Any) -> str | None:
    """The path in a cell that holds no bytes."""
    if isinstance(cell, dict):
        return cell.get("path") if cell.get("bytes") is None else None
    return cell if isinstance(cell, str) else None


def _digest_of_column(table: Any) -> str:
    """The hash of a table's cells, from the stream that Arrow would write of it."""
    arrow = require("pyarrow", "data", "read tables")
    if table._indices is not None:
        table = table.flatten_indices()
    hashing = _Hashing()
    inner = table.data.table
    # What `datasets` notes in the schema is no part of the images.
    inner = inner.replace_schema_metadata(None)
    with arrow.ipc.new_stream(arrow.PythonFile(hashing, mode="w"), inner.schema) as writer:
        writer.write_table(inner, max_chunksize=1024)  # however the table is cut into pieces
    return hashing.whole.hexdigest()


class _Hashing:
    """A file that keeps only the hash of what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.whole = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.whole.update(data)
        return len(data)

    def flush(self) -> None: ...
    def close(self) -> None: ...


def _labels(table: Any, column: str, what: str) -> Labels:
    """The labels of a column. Raises DataError, naming the row, where one is missing or is no class."""
    kind = table.features[column]
    values = list(table.select_columns([column]).with_format(None)[:][column])
    if not values:
        raise DataError(f"the {what} is empty (0 samples); give at least one image")
    names = tuple(getattr(kind, "names", None) or ())
    missing = [row for row, value in enumerate(values) if _is_missing(value) or (names and value == -1)]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(values)} rows of the {what} have no label in column {column!r}, first row "
            f"{missing[0]}; remove them or label them"
        )
    if all(isinstance(value, str) for value in values):
        return _of_words(values)
    if all(isinstance(value, list) for value in values):
        return Labels(_of_one_hot(values, column, what))
    array = np.asarray(values)
    if array.dtype.kind == "f" and array.ndim == 1:
        broken = np.flatnonzero(array != np.rint(array))
        if len(broken):
            raise DataError(
                f"column {column!r} of the {what} holds the number {array[broken[0]]:g} in row {broken[0]}, but "
                "labels must be whole numbers or words; name another column with --columns IMAGE,LABEL"
            )
        array = np.rint(array)
    if array.dtype.kind not in "iubf" or array.ndim != 1:
        raise DataError(
            f"column {column!r} of the {what} holds values of type {type(values[0]).__name__}, but labels must be "
            "whole numbers or words; name another column with --columns IMAGE,LABEL"
        )
    return Labels(array.astype(np.int64), names)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not np.isfinite(value))


def _of_words(words: Sequence[str]) -> Labels:
    """Words in alphabetical order; numbers that were written as words in that of their values."""
    count = all(word.isdecimal() for word in set(words))
    names = tuple(sorted(set(words), key=(lambda word: (int(word), word)) if count else None))
    position = {name: number for number, name in enumerate(names)}
    return Labels(np.asarray([position[word] for word in words], np.int64), names)


def _of_one_hot(rows: Sequence[Sequence[Any]], column: str, what: str) -> np.ndarray:
    """The place of the only 1 in each row of zeros."""
    widths = {len(row) for row in rows}
    array = np.asarray(rows) if len(widths) == 1 else np.zeros((len(rows), 0))
    one = (array == 1).sum(-1) == 1 if array.ndim == 2 and array.shape[1] else np.zeros(len(rows), bool)
    good = one & ((array == 0).sum(-1) == array.shape[-1] - 1) if one.any() else one
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise DataError(
            f"column {column!r} of the {what} holds {list(rows[row])[:8]} in row {row}, but a label that is a list "
            "must have one 1 and zeros, all of one length; several classes per image are not supported"
        )
    return array.argmax(-1).astype(np.int64)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
