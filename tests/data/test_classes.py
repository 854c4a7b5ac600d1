"""Class numbers follow names: between splits, between calls, and between data and model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pictures import cells, class_folders, write_table
from tersenet.data import open_data
from tersenet.data.classes import Labels, in_model_order, of_words, translated, united
from tersenet.errors import DataError, InputWarning
from tersenet.task import Preparation

RGB = Preparation((8, 8), (0.0,) * 3, (1.0,) * 3)
THREE = {"bus": "red", "car": "lime", "van": "blue"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TERSENET_CACHE", str(folder))
    return folder


def names_of(data, split: str) -> list[str]:
    part = getattr(data, split)
    return [data.labels[number] for number in part.labels.tolist()]


def colours_of(data, split: str) -> list[list[int]]:
    return getattr(data, split).images[:, :, 0, 0].tolist()


def test_a_class_that_is_added_moves_the_labels_of_cached_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        class_folders(tmp_path / split, THREE, 1)
    spec = f"folder:{tmp_path}"
    assert open_data(spec, RGB, quiet=True).test.labels.tolist() == [0, 1, 2]
    class_folders(tmp_path / "train", {"ambulance": "white"}, 1)
    with pytest.warns(InputWarning, match=r"test set of .* no images of 1 of the 4 classes \(ambulance\)"):
        data = open_data(spec, RGB, quiet=True)
    assert data.labels == ("ambulance", "bus", "car", "van")
    assert names_of(data, "test") == ["bus", "car", "van"]
    assert data.test.labels.tolist() == [1, 2, 3]


def test_the_same_of_tables_with_words(tmp_path: Path) -> None:
    colours, words = ["red", "lime", "blue"], ["bus", "car", "van"]
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", {"image": cells(*colours), "label": words})
    spec = f"parquet:{tmp_path}"
    assert open_data(spec, RGB, quiet=True).test.labels.tolist() == [0, 1, 2]
    write_table(tmp_path / "train.parquet", {"image": cells("white", *colours), "label": ["ambulance", *words]})
    with pytest.warns(InputWarning, match="ambulance"):
        data = open_data(spec, RGB, quiet=True)
    assert names_of(data, "test") == words


def test_another_folder_with_the_same_names_sizes_and_times_is_another_data_set(tmp_path: Path) -> None:
    for which, pair in (("a", ("red", "lime")), ("b", ("blue", "white"))):
        class_folders(tmp_path / which, dict(zip("xy", pair, strict=True)), 2, "bmp")
        for file in (tmp_path / which).rglob("*.bmp"):
            os.utime(file, (1e9, 1e9))
    first = open_data(f"folder:{tmp_path / 'a'}", RGB, quiet=True)
    second = open_data(f"folder:{tmp_path / 'b'}", RGB, quiet=True)
    assert colours_of(first, "train") == [[255, 0, 0], [0, 255, 0]]
    assert colours_of(second, "train") == [[0, 0, 255], [255, 255, 255]]


def test_a_moved_folder_is_not_decoded_again(tmp_path: Path, cache: Path) -> None:
    class_folders(tmp_path / "a", THREE)
    open_data(f"folder:{tmp_path / 'a'}", RGB, quiet=True)
    stored = {path.name for path in (cache / "images").iterdir()}
    (tmp_path / "a").rename(tmp_path / "b")
    assert names_of(open_data(f"folder:{tmp_path / 'b'}", RGB, quiet=True), "test") == ["bus", "car", "van"]
    assert {path.name for path in (cache / "images").iterdir()} == stored


def test_images_that_change_places_are_decoded_again(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": "red", "b": "blue"}, 1)
    spec = f"folder:{tmp_path}"
    open_data(spec, RGB, quiet=True)
    one, other = tmp_path / "train" / "a" / "0.png", tmp_path / "train" / "b" / "0.png"
    red = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(red)
    assert colours_of(open_data(spec, RGB, quiet=True), "train") == [[0, 0, 255], [255, 0, 0]]


def test_unreadable_images_are_named_as_they_are_called_now(tmp_path: Path) -> None:
    class_folders(tmp_path / "a", THREE)
    (tmp_path / "a" / "car" / "1.png").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"car.1\.png"):
        open_data(f"folder:{tmp_path / 'a'}", RGB, on_bad_image="skip", quiet=True)
    (tmp_path / "a" / "car").rename(tmp_path / "a" / "cat")
    with pytest.warns(UserWarning, match=r"cat.1\.png"):
        data = open_data(f"folder:{tmp_path / 'a'}", RGB, on_bad_image="skip", quiet=True)
    assert data.labels == ("bus", "cat", "van")


def test_data_with_names_keeps_them_beside_a_model_with_others(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"apple": "red", "banana": "yellow"}, 1)
    model = Preparation((8, 8), (0.0,) * 3, (1.0,) * 3, ("0", "1", "2"))
    assert open_data(f"folder:{tmp_path}", model, quiet=True).labels == ("apple", "banana")


def test_equal_names_in_another_order_are_counted_as_the_model_does(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", THREE, 1)
    model = Preparation((8, 8), (0.0,) * 3, (1.0,) * 3, ("van", "bus", "car"))
    data = open_data(f"folder:{tmp_path}", model, quiet=True)
    assert (data.labels, data.train.labels.tolist()) == (("van", "bus", "car"), [1, 2, 0])


def test_fewer_classes_than_the_model_are_counted_as_the_model_does(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"7": "red", "8": "lime", "9": "blue"}, 1)
    model = Preparation((8, 8), (0.0,) * 3, (1.0,) * 3, tuple("0123456789"))
    data = open_data(f"folder:{tmp_path}", model, quiet=True)
    assert (data.classes, data.train.labels.tolist()) == (10, [7, 8, 9])


def test_numbers_are_no_names() -> None:
    assert in_model_order(("0", "1"), ("cat", "dog"), "x") == ("cat", "dog")
    assert translated(Labels(np.asarray([1, 0]), ("0", "1")), ("cat", "dog")).tolist() == [1, 0]


def test_names_that_fit_in_part_are_said() -> None:
    with pytest.warns(InputWarning, match="output 1 is 'eel', and the model has 1 outputs"):
        assert in_model_order(("cat", "eel"), ("cat",), "x") == ("cat", "eel")
    with pytest.warns(InputWarning, match=r"by name \(eel\), .* output 0 is 'cat', not 'dog'"):
        assert in_model_order(("cat", "eel"), ("dog", "cat"), "x") == ("cat", "eel")


def test_splits_with_names_in_another_order_are_translated() -> None:
    parts = {"train": Labels(np.asarray([0, 1]), ("b", "a")), "test": Labels(np.asarray([0, 1]), ("a", "b"))}
    found, names = united(parts, "x")
    assert names == ("b", "a")
    assert found["test"].numbers.tolist() == [1, 0]
    with pytest.raises(DataError, match="train set of x has class names and the test set has numbers"):
        united({"train": of_words(["a"]), "test": Labels(np.asarray([0]))}, "x")


def test_a_held_out_set_is_counted_by_name(tmp_path: Path) -> None:
    class_folders(tmp_path / "a" / "train", THREE, 1)
    class_folders(tmp_path / "b", {"van": "blue", "car": "lime"}, 1)
    data = open_data(f"folder:{tmp_path / 'a'}", RGB, validate=f"folder:{tmp_path / 'b'}", quiet=True)
    assert names_of(data, "validate") == ["car", "van"]


def test_folders_of_numbers_in_alphabetical_order_are_said(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {str(number): "red" for number in range(11)}, 1)
    with pytest.warns(InputWarning, match=r"numbers in alphabetical order \(0, 1, 10, 2, 3 and 6 more\)"):
        open_data(f"folder:{tmp_path}", RGB, quiet=True)
