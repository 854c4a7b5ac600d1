"""A folder is a split by what it holds, not by its name alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pictures import class_folders, plain
from tersenet.data.layout import splits_in
from tersenet.data.readers import folder
from tersenet.errors import DataError, InputWarning

TWO = {"cat": "red", "dog": "blue"}


@pytest.mark.parametrize("name", ["train", "test", "val", "Training"])
def test_a_class_may_be_called_as_a_split(tmp_path: Path, name: str) -> None:
    class_folders(tmp_path, {"bus": "red", "car": "lime", name: "blue"})
    found = folder(tmp_path)
    assert found.labels == tuple(sorted(["bus", "car", name]))
    assert {split: len(part.labels) for split, part in found.splits.items()} == {"train": 3, "test": 3}


def test_a_class_within_a_split_may_be_called_as_a_split(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"car": "red", "train": "blue"})
    class_folders(tmp_path / "test", {"car": "red", "train": "blue"})
    assert folder(tmp_path).labels == ("car", "train")


def test_splits_may_be_written_large_and_have_neighbours_without_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "Train", TWO)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no image")
    assert splits_in(tmp_path) == {"train": tmp_path / "Train"}


def test_neighbours_of_splits_that_hold_images_are_said(tmp_path: Path) -> None:
    for name in ("train", "test", "raw"):
        class_folders(tmp_path / name, TWO)
    with pytest.warns(InputWarning, match="raw/ in .* neither train, val nor test and is left out"):
        assert set(splits_in(tmp_path)) == {"train", "test"}


def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, TWO)
    class_folders(tmp_path / "train", {"day": "red", "night": "blue"})
    with pytest.raises(DataError, match=r"two ways: train/ may be .* beside cat/ and dog/"):
        folder(tmp_path)


def test_splits_without_class_folders_are_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        plain("red").save(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="test/ and train/ with images and no class folders"):
        folder(tmp_path)


def test_two_names_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("val", "valid"):
        class_folders(tmp_path / name, TWO)
    with pytest.raises(DataError, match="val/ and valid/, which mean the same split"):
        folder(tmp_path)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "test", TWO)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"train holds no images \(0 samples\)"):
        folder(tmp_path)


def test_single_images_leave_nothing_to_hold_back(tmp_path: Path) -> None:
    class_folders(tmp_path, TWO, 1)
    with pytest.raises(DataError, match="no class of two images or more"):
        folder(tmp_path)
