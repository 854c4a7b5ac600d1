"""Images of every mode become the pixels that they show, or are refused by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pictures import plain, write_table
from tersenet.data import open_data
from tersenet.data.pixels import Span, pixels
from tersenet.errors import DataError, InputWarning
from tersenet.task import Preparation

RGB = Preparation((8, 8), (0.0,) * 3, (1.0,) * 3)
GREY = Preparation((8, 8), (0.0,), (1.0,))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path_factory.mktemp("cache")))


def of_files(root: Path, images: dict[str, Image.Image], preparation: Preparation = GREY, **more: Any) -> Any:
    place = root / "train" / "one"
    place.mkdir(parents=True)
    for name, image in images.items():
        image.save(place / name)
    return open_data(f"folder:{root}", preparation, quiet=True, **more).train


def constant(value: Any, kind: Any) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, kind))


def values(data: Any) -> list[int]:
    return data.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("kind", "given", "read", "white"),
    [
        (np.float32, [0.0, 0.5, 1.0], [0, 128, 255], "1 is"),
        (np.float32, [0.0, 0.5, 255.0], [0, 0, 255], "255 is"),  # one dark image does not become bright
        (np.int32, [0, 7, 255], [0, 7, 255], "255 is"),
        (np.uint16, [0, 256, 4095], [0, 1, 15], "65535 is .*dark"),
        (np.uint16, [0, 7, 200], [0, 7, 200], "255 is"),
    ],
)
def test_images_of_more_than_8_bits(tmp_path: Path, kind: Any, given: list, read: list, white: str) -> None:
    images = {f"{number}.tiff": constant(value, kind) for number, value in enumerate(given)}
    with pytest.warns(InputWarning, match=white):
        data = of_files(tmp_path, images)
    assert values(data) == read
    with pytest.warns(InputWarning, match=white):  # from the cache it is said again
        assert values(open_data(f"folder:{tmp_path}", GREY, quiet=True).train) == read


@pytest.mark.parametrize("kind", [np.int32, np.uint16])
def test_images_that_fill_16_bits_are_nothing_to_speak_of(tmp_path: Path, kind: Any) -> None:
    images = {f"{number}.tiff": constant(value, kind) for number, value in enumerate([0, 256, 65535])}
    assert values(of_files(tmp_path, images)) == [0, 1, 255]


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (np.float32, [0.0, -1.0, 1.0], "from -1 to 1"),
        (np.float32, [0.0, 1.0, 1e6], r"from 0 to 1e\+06"),
        (np.int32, [0, 100000, 1], "from 0 to 100000"),
        (np.float32, [0.5, float("nan"), 0.5], r"1\.tiff .*NaN"),
        (np.float32, [0.5, 0.5, float("inf")], r"2\.tiff .*infinite"),
    ],
)
def test_values_of_no_convention_are_refused(tmp_path: Path, kind: Any, given: list, words: str) -> None:
    images = {f"{number}.tiff": constant(value, kind) for number, value in enumerate(given)}
    with pytest.raises(DataError, match=words):
        of_files(tmp_path, images)


def test_one_bit_and_other_modes(tmp_path: Path) -> None:
    images = {
        "a_one_bit.png": Image.new("1", (8, 8), 1),
        "b_grey_alpha.png": Image.new("LA", (8, 8), (90, 255)),
        "c_ink.jpg": Image.new("CMYK", (8, 8), (0, 0, 0, 165)),
        "d_palette.gif": plain((90, 90, 90)).quantize(2),
    }
    data = of_files(tmp_path, images)
    assert values(data)[0] == 255
    assert all(abs(value - 90) <= 1 for value in values(data)[1:])


def test_transparent_pixels_are_said(tmp_path: Path) -> None:
    with pytest.warns(InputWarning, match=r"b\.png .*transparent"):
        data = of_files(
            tmp_path,
            {"a.png": plain((9, 9, 9, 255), "RGBA"), "b.png": plain((50, 60, 70, 0), "RGBA")},
            RGB,
        )
    assert data.images[1, :, 0, 0].tolist() == [50, 60, 70]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first_is_read_and_said(ending: str, tmp_path: Path) -> None:
    place = tmp_path / "train" / "one"
    place.mkdir(parents=True)
    plain((0, 0, 250)).save(place / "a.png")
    plain((250, 0, 0)).save(place / f"b.{ending}", save_all=True, append_images=[plain((0, 250, 0))] * 2)
    for _ in range(2):  # from the cache too
        with pytest.warns(InputWarning, match=rf"b\.{ending} .*have several frames or pages, of which the first alone"):
            data = open_data(f"folder:{tmp_path}", RGB, quiet=True).train
        assert data is not None
        red, green, _ = data.images[1, :, 0, 0].tolist()
        assert red > 200 > 50 > green
    # A camera's second picture is a preview.
    (place / f"b.{ending}").unlink()
    plain((250, 0, 0)).save(place / "b.jpg", "MPO", save_all=True, append_images=[plain((0, 250, 0))])
    assert open_data(f"folder:{tmp_path}", RGB, quiet=True).train is not None


def test_colours_that_a_grey_model_does_not_see_are_said(tmp_path: Path) -> None:
    with pytest.warns(InputWarning, match=r"b\.png .*colors and are turned to grey"):
        of_files(tmp_path, {"a.png": plain("gray"), "b.png": plain("red")})


def test_grey_images_for_a_model_of_colours_are_said(tmp_path: Path) -> None:
    with pytest.warns(InputWarning, match="are grey, and are repeated over the 3 channels"):
        data = of_files(tmp_path, {"a.png": constant(7, np.uint8)}, RGB)
    assert data.images[0, :, 0, 0].tolist() == [7, 7, 7]


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "train" / "one").mkdir(parents=True)
    (tmp_path / "train" / "one" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.png .*it is empty, 0 bytes"):
        open_data(f"folder:{tmp_path}", GREY, quiet=True)


@pytest.mark.parametrize(
    "array",
    [
        np.full((8, 8), 90, np.uint8), np.full((8, 8, 3), 90, np.uint8), np.full((3, 8, 8), 90, np.uint8),
        np.full((1, 8, 8), 90, np.int64), np.full((8, 8, 4), 90, np.uint8), np.full((8, 8), 90 / 255, np.float32),
    ],
)  # fmt: skip
def test_arrays(array: np.ndarray) -> None:
    assert pixels(array, RGB).shape == (3, 8, 8)
    assert set(pixels(array, GREY).reshape(-1).tolist()) == {90}


def test_spans_of_a_set_count_and_not_those_of_an_image() -> None:
    dark = np.full((8, 8), 1.0, np.float32)
    assert pixels(dark, GREY).max() == 255
    assert pixels(dark, GREY, Span(0.0, 200.0, True)).max() == 1
    with pytest.raises(ValueError, match=r"shape \(784,\)"):
        pixels(np.zeros(784, np.uint8), GREY)


def bytes_of(value: int) -> bytes:
    stream = io.BytesIO()
    constant(value, np.uint8).save(stream, "PNG")
    return stream.getvalue()


def test_tables_hold_images_in_every_form(tmp_path: Path) -> None:
    for value in (30, 60):
        (tmp_path / f"{value}.png").write_bytes(bytes_of(value))
    forms: dict[str, list] = {
        "cells": [{"bytes": bytes_of(value), "path": "x.png"} for value in (30, 60)],
        "bytes": [bytes_of(value) for value in (30, 60)],
        "paths": ["30.png", "60.png"],
        "arrays": [np.full((8, 8), value, np.uint8).tolist() for value in (30, 60)],
    }
    for name, images in forms.items():
        place = tmp_path / name
        write_table(place / "train.parquet", {"image": images, "label": [0, 1]})
        if name == "paths":
            for value in (30, 60):
                (tmp_path / f"{value}.png").rename(place / f"{value}.png")
        if name == "arrays":  # 64-bit whole numbers
            with pytest.warns(InputWarning, match="from 30 to 60, of which 255 is"):
                assert values(open_data(f"parquet:{place}", GREY, quiet=True).train) == [30, 60]
        else:
            assert values(open_data(f"parquet:{place}", GREY, quiet=True).train) == [30, 60], name


def test_files_that_a_table_names_are_part_of_what_is_cached(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", {"image": ["a.png", "b.png"], "label": [0, 1]})
    for value, name in ((30, "a.png"), (60, "b.png")):
        (tmp_path / name).write_bytes(bytes_of(value))
    spec = f"parquet:{tmp_path}"
    assert values(open_data(spec, GREY, quiet=True).train) == [30, 60]
    (tmp_path / "b.png").write_bytes(bytes_of(90))
    assert values(open_data(spec, GREY, quiet=True).train) == [30, 90]


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        ([1.0, 0.0], [1, 0]),
        ([True, False], [1, 0]),
        ([[0, 1, 0], [0, 0, 1]], [1, 2]),
        (["cat", "ant"], [1, 0]),
        (["10", "9"], [1, 0]),
    ],
)
def test_labels_in_every_form(tmp_path: Path, labels: list, numbers: list[int]) -> None:
    write_table(tmp_path / "train.parquet", {"image": [bytes_of(30), bytes_of(60)], "label": labels})
    assert open_data(f"parquet:{tmp_path}", GREY, quiet=True).train.labels.tolist() == numbers


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, None], "1 of the 2 rows .* have no label in column 'label', first row 1"),
        ([0.5, 1.0], r"holds the number 0\.5 in row 0"),
        ([1.0, float("nan")], "have no label .* first row 1"),
        ([[0, 1, 1], [1, 0, 0]], r"holds \[0, 1, 1\] in row 0, but a label that is a list must"),
        ([[1], [0, 1]], "all of one length"),
        (["cat", None], "have no label .* first row 1"),
    ],
)
def test_labels_that_are_no_classes_are_refused_by_their_row(tmp_path: Path, labels: list, words: str) -> None:
    write_table(tmp_path / "train.parquet", {"image": [bytes_of(30), bytes_of(60)], "label": labels})
    with pytest.raises(DataError, match=words):
        open_data(f"parquet:{tmp_path}", GREY, quiet=True)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_a_share_of_the_resized_image_is_cut_out(interpolation: str) -> None:
    """The shorter side becomes size / crop, and the middle is the input, as in timm and torchvision."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    found = pixels(image, Preparation((28, 28), (0.5,) * 3, (0.5,) * 3, (), interpolation, 0.875))
    resized = image.resize((48, 32), getattr(Image.Resampling, interpolation.upper()))
    assert np.array_equal(found, np.asarray(resized.crop((10, 2, 38, 30))).transpose(2, 0, 1))


def test_small_images_are_enlarged_to_be_cut() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8))
    found = pixels(image, Preparation((28, 28), (0.5,) * 3, (0.5,) * 3, crop=0.875))
    resized = image.resize((64, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(found, np.asarray(resized.crop((18, 2, 46, 30))).transpose(2, 0, 1))
