"""Every form of data, on files made here; and the reference data where it is present."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tersenet.data import open_data
from tersenet.data.readers import stratified
from tersenet.errors import DataError, InputWarning, MissingExtra, SettingsError
from tersenet.task import Preparation

SHARED = Path(__file__).parents[3] / "shared" / "data"
RGB = Preparation((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
GREY = Preparation((8, 8), (0.0,), (1.0,))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TERSENET_CACHE", str(folder))
    return folder


def picture(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.full((*size, 3), value, np.uint8))


def png(value: int) -> bytes:
    stream = io.BytesIO()
    picture(value).save(stream, "PNG")
    return stream.getvalue()


def folders(root: Path, counts: dict[str, int]) -> Path:
    """root/CLASS/NUMBER.png; the grey value of an image is 10 times the number of its class, plus its own."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(10 * number + i).save(root / name / f"{i}.png")
    return root


def table(path: Path, images: list, labels: list, names: tuple[str, str] = ("img", "label"), kind=None) -> None:
    import datasets

    features = datasets.Features({names[0]: datasets.Image(), names[1]: kind or datasets.Value("int64")})
    rows = {names[0]: [{"bytes": image, "path": None} for image in images], names[1]: labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def parquet(root: Path, **changes) -> str:
    table(root / "train.parquet", [png(i) for i in range(6)], [0, 1, 2, 0, 1, 2], **changes)
    table(root / "test-00000-of-00001.parquet", [png(100 + i) for i in range(3)], [2, 1, 0], **changes)
    return f"parquet:{root}"


def test_pictures_of_one_channel_are_not_mirrored(tmp_path: Path) -> None:
    spec = parquet(tmp_path)
    assert open_data(spec, RGB).train.augment == "crop_flip"
    assert open_data(spec, GREY).train.augment == "crop"


def test_digits_are_split_the_same_way_always() -> None:
    data = open_data("digits", GREY, seed=7)
    assert (data.train.samples, data.test.samples, data.classes) == (1438, 359, 10)
    counts = torch.bincount(data.test.labels)
    assert counts.tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]  # a fifth of each digit
    assert torch.equal(data.test.images, open_data("digits", GREY, seed=8).test.images)
    assert int(data.test.images.max()) == 255
    assert (data.train.augment, data.train.shuffle, data.test.augment) == ("crop", True, None)
    assert data.calibrate.samples == 1024
    assert data.calibrate.augment is None
    from sklearn.datasets import load_digits

    original = torch.from_numpy(load_digits().images)
    joined = torch.cat([data.train.images, data.test.images])[:, 0].double() * 16 / 255
    assert torch.allclose(joined.sum(0), original.sum(0), atol=20)  # every image once, rounded to 8 bits


def test_digits_in_another_size_and_colour() -> None:
    data = open_data("digits", Preparation((16, 16)), limit=5)
    assert data.train.images.shape == (5, 3, 16, 16)


def test_stratified_takes_its_share_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 5, 1])
    rest, test = stratified(labels)
    assert np.bincount(labels[test], minlength=3).tolist() == [2, 1, 0]
    assert sorted([*rest, *test]) == list(range(16))


def test_parquet(tmp_path) -> None:
    data = open_data(parquet(tmp_path), RGB, batch_size=4, quiet=True)
    assert data.test.images[:, 0, 0, 0].tolist() == [100, 101, 102]
    assert data.test.labels.tolist() == [2, 1, 0]
    assert (data.classes, data.labels, data.validate) == (3, ("0", "1", "2"), None)
    assert data.train.images[:, 1, 3, 3].tolist() == list(range(6))
    assert sorted(data.calibrate.labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_parquet_columns_are_found_or_named(tmp_path) -> None:
    spec = parquet(tmp_path, names=("photo", "what"))
    with pytest.raises(DataError, match=r"no label column .* photo, what"):
        open_data(spec, RGB, quiet=True)
    assert open_data(spec, RGB, columns=("photo", "what"), quiet=True).test.labels.tolist() == [2, 1, 0]
    with pytest.raises(DataError, match=r"no columns 'nothing' .* photo, what"):
        open_data(spec, RGB, columns=("photo", "nothing"), quiet=True)


def test_parquet_class_names_and_words(tmp_path) -> None:
    import datasets

    names = ["ant", "bee", "cow"]
    assert open_data(parquet(tmp_path / "a", kind=datasets.ClassLabel(names=names)), RGB, quiet=True).labels == tuple(
        names
    )
    table(tmp_path / "b" / "train.parquet", [png(0), png(1)], ["dog", "cat"], kind=datasets.Value("string"))
    table(tmp_path / "b" / "test.parquet", [png(2)], ["dog"], kind=datasets.Value("string"))
    with pytest.warns(InputWarning, match=r"test set .* no images of 1 of the 2 classes \(cat\)"):
        data = open_data(f"parquet:{tmp_path / 'b'}", RGB, quiet=True)
    assert (data.labels, data.train.labels.tolist(), data.test.labels.tolist()) == (("cat", "dog"), [1, 0], [1])
    table(tmp_path / "b" / "test.parquet", [png(2)], ["eel"], kind=datasets.Value("string"))
    with pytest.warns(InputWarning) as said:
        data = open_data(f"parquet:{tmp_path / 'b'}", RGB, quiet=True)
    assert (data.labels, data.train.labels.tolist(), data.test.labels.tolist()) == (("cat", "dog", "eel"), [1, 0], [2])
    assert "no images of 1 of the 3 classes (eel), so nothing can learn" in str(said[0].message)
    assert "no images of 2 of the 3 classes (cat, dog), so the score" in str(said[1].message)


def test_validation_files_are_the_test_set_only_where_there_is_no_other(tmp_path) -> None:
    spec = parquet(tmp_path)
    table(tmp_path / "validation.parquet", [png(50)], [1])
    data = open_data(spec, RGB, quiet=True)
    assert (data.validate.samples, data.test.samples) == (1, 3)
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    data = open_data(spec, RGB, quiet=True)
    assert (data.validate, data.test.samples) == (None, 1)


def test_negative_labels_are_refused(tmp_path) -> None:
    spec = parquet(tmp_path)
    table(tmp_path / "test-00000-of-00001.parquet", [png(0), png(1)], [0, -1])
    with pytest.raises(DataError, match="from -1 to 0"):
        open_data(spec, RGB, quiet=True)


def test_a_label_that_the_training_set_lacks_is_said(tmp_path) -> None:
    spec = parquet(tmp_path)
    table(tmp_path / "test-00000-of-00001.parquet", [png(0), png(1)], [0, 5])
    with pytest.warns(InputWarning, match="label 5, which the training set has not"):
        assert open_data(spec, RGB, quiet=True).test.labels.tolist() == [0, 5]


def test_labels_beyond_those_of_the_model_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="from 0 to 2, but there are 2 classes"):
        open_data(parquet(tmp_path), Preparation((8, 8), labels=("a", "b")), quiet=True)


def test_folder_with_train_val_and_test(tmp_path) -> None:
    folders(tmp_path / "train", {"ant": 4, "bee": 3})
    folders(tmp_path / "val", {"bee": 2})
    folders(tmp_path / "test", {"ant": 1, "bee": 2})
    data = open_data(f"folder:{tmp_path}", RGB, quiet=True)
    assert (data.labels, data.classes) == (("ant", "bee"), 2)
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 10, 11, 12]
    assert data.validate.labels.tolist() == [1, 1]
    assert data.test.labels.tolist() == [0, 1, 1]


def test_folder_of_classes_gets_a_fixed_fifth_as_test_set(tmp_path) -> None:
    folders(tmp_path / "a", {"ant": 10, "bee": 5})
    spec = f"folder:{tmp_path / 'a'}"
    data = open_data(spec, GREY, quiet=True)
    assert (data.train.samples, data.test.samples, data.validate) == (12, 3, None)
    greys = data.train.images[:, 0, 0, 0].tolist() + data.test.images[:, 0, 0, 0].tolist()
    assert sorted(greys) == list(range(15))  # each image in one of the two
    assert torch.equal(open_data(spec, GREY, seed=3, quiet=True).test.images, data.test.images)


def test_validate_names_a_held_out_set(tmp_path) -> None:
    folders(tmp_path / "a", {"ant": 5, "bee": 5})
    folders(tmp_path / "b", {"ant": 2, "bee": 3})
    data = open_data(f"folder:{tmp_path / 'a'}", RGB, validate=f"folder:{tmp_path / 'b'}", quiet=True)
    assert (data.validate.samples, data.train.samples) == (5, 8)
    folders(tmp_path / "c", {"wasp": 2})
    with pytest.raises(DataError, match="wasp"):
        open_data(f"folder:{tmp_path / 'a'}", RGB, validate=f"folder:{tmp_path / 'c'}", quiet=True)


def test_folder_errors_name_the_folder(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no folder .*absent"):
        open_data(f"folder:{tmp_path / 'absent'}", RGB)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no class folders"):
        open_data(f"folder:{tmp_path / 'empty'}", RGB)
    folders(tmp_path / "hollow", {"ant": 1, "bee": 0})
    with pytest.raises(DataError, match="bee holds no images"):
        open_data(f"folder:{tmp_path / 'hollow'}", RGB)


def test_parquet_errors_name_the_files(tmp_path) -> None:
    with pytest.raises(DataError, match="no folder"):
        open_data(f"parquet:{tmp_path / 'absent'}", RGB)
    with pytest.raises(DataError, match="named after its split"):
        open_data(f"parquet:{tmp_path}", RGB)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as parquet"):
        open_data(f"parquet:{tmp_path}", RGB)


@pytest.mark.parametrize("spec", ["digit", "parquet:", "csv:x", "", "random:3x8", "random:3x0x8"])
def test_an_unknown_form_is_answered_with_the_known_ones(spec) -> None:
    with pytest.raises(DataError, match=r"write (one of digits, parquet:DIR|random:CxHxW)"):
        open_data(spec, RGB)


def test_noise() -> None:
    data = open_data("random:3x20x12", RGB, batch_size=16)
    assert (data.train, data.test, data.classes, data.calibrate.samples) == (None, None, 0, 64)
    (x,) = next(iter(data.calibrate))
    assert x.shape == (16, 3, 20, 12)
    assert abs(float(x.mean()) - 0.5) < 0.05
    with pytest.raises(DataError, match="1 channels"):
        open_data("random:1x8x8", RGB)


def test_a_corrupt_image_is_named(tmp_path) -> None:
    folders(tmp_path, {"ant": 5, "bee": 5})
    whole = (tmp_path / "ant" / "3.png").read_bytes()
    (tmp_path / "ant" / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bee" / "1.png").write_bytes(b"no image at all")
    spec = f"folder:{tmp_path}"
    with pytest.raises(DataError, match=r"(ant/3|bee/1)\.png"):
        open_data(spec, RGB, quiet=True)
    with pytest.warns(UserWarning, match="unreadable images .* were left out"):
        data = open_data(spec, RGB, on_bad_image="skip", quiet=True)
    assert set(data.bad) == {os.path.join("ant", "3.png"), os.path.join("bee", "1.png")}
    assert data.train.samples + data.test.samples == 8
    with pytest.raises(DataError, match=r"\.png"):  # from the cache too
        open_data(spec, RGB, quiet=True)
    with pytest.raises(SettingsError, match="'stop' or 'skip'"):
        open_data(spec, RGB, on_bad_image="ignore")


def test_a_corrupt_row_is_named(tmp_path) -> None:
    table(tmp_path / "train.parquet", [png(1), b"broken", png(2)], [0, 1, 1])
    with pytest.raises(DataError, match="row 1 of train"):
        open_data(f"parquet:{tmp_path}", RGB, quiet=True)
    with pytest.warns(UserWarning, match="1 unreadable images"):
        data = open_data(f"parquet:{tmp_path}", RGB, on_bad_image="skip", quiet=True)
    assert (data.bad, data.train.labels.tolist(), data.test) == (("row 1 of train",), [0, 1], None)


def test_no_readable_image_is_no_data(tmp_path) -> None:
    table(tmp_path / "train.parquet", [b"broken"], [0])
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match="0 samples"):
        open_data(f"parquet:{tmp_path}", RGB, on_bad_image="skip", quiet=True)


def test_images_of_other_sizes_and_modes(tmp_path) -> None:
    place = tmp_path / "train" / "one"
    place.mkdir(parents=True)
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # the middle third is what the crop keeps
    Image.fromarray(wide).save(place / "a_wide.png")
    picture(90, (4, 4)).save(place / "b_small.png")
    picture(90, (8, 8)).convert("L").save(place / "c_grey.png")
    picture(90, (8, 8)).quantize(2).save(place / "d_palette.png", transparency=b"\xff\x80")
    picture(90, (8, 8)).convert("RGBA").save(place / "e_alpha.png")
    Image.fromarray(np.full((8, 8), 90 * 256, np.uint16)).save(place / "f_sixteen.png")
    turned = Image.fromarray(np.repeat(np.array([[0, 200]], np.uint8), 8, 0).repeat(4, 1))
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    turned.save(place / "g_turned.png", exif=exif)
    for preparation in (RGB, GREY):
        images = open_data(f"folder:{tmp_path}", preparation, quiet=True).train.images
        assert images.shape == (7, preparation.channels, 8, 8)
        assert int(images[0].min()) > 170  # the edge of the crop is blended a little
        assert images[1:6].unique().tolist() == [90]
        assert images[6, 0, 0].tolist() == [200] * 4 + [0] * 4


def test_limit_takes_the_same_images_each_time(tmp_path) -> None:
    folders(tmp_path / "train", {"ant": 9, "bee": 9})
    spec = f"folder:{tmp_path}"
    data = open_data(spec, RGB, limit=6, quiet=True)
    assert data.train.samples == 6
    assert set(data.train.labels.tolist()) == {0, 1}
    assert torch.equal(open_data(spec, RGB, limit=6, seed=9, quiet=True).train.images, data.train.images)
    with pytest.raises(SettingsError, match="limit"):
        open_data(spec, RGB, limit=0)


def test_decoded_images_are_cached_by_what_they_come_from(tmp_path, cache, monkeypatch) -> None:
    from tersenet.data import decode

    folders(tmp_path / "d" / "train", {"ant": 3})
    spec = f"folder:{tmp_path / 'd'}"
    decoded = []
    pixels = decode.pixels
    monkeypatch.setattr(decode, "pixels", lambda *args: decoded.append(1) or pixels(*args))
    first = open_data(spec, RGB, quiet=True).train.images
    assert len(decoded) == 3
    assert torch.equal(open_data(spec, RGB, quiet=True).train.images, first)
    assert len(decoded) == 3
    open_data(spec, GREY, quiet=True)  # other channels
    assert len(decoded) == 6
    picture(200).save(tmp_path / "d" / "train" / "ant" / "1.png")
    assert int(open_data(spec, RGB, quiet=True).train.images[1, 0, 0, 0]) == 200
    assert len(decoded) == 9
    assert not list(cache.rglob(".writing-*"))
    for file in cache.rglob("images.npy"):  # damaged: decoded again
        file.write_bytes(file.read_bytes()[:100])
    assert int(open_data(spec, RGB, quiet=True).train.images[1, 0, 0, 0]) == 200
    assert len(decoded) == 12


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch) -> None:
    folders(tmp_path / "d" / "train", {"ant": 3})
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be cached"):
        assert open_data(f"folder:{tmp_path / 'd'}", RGB, quiet=True).train.samples == 3


def test_the_progress_bar_is_on_standard_error(tmp_path, capsys) -> None:
    folders(tmp_path / "train", {"ant": 3})
    open_data(f"folder:{tmp_path}", RGB)
    assert capsys.readouterr().out == ""


def test_importing_loads_no_optional_package() -> None:
    code = (
        "import sys, tersenet.data; "
        "print([name for name in ('datasets', 'PIL', 'kornia', 'sklearn', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(MissingExtra, match=r"tersenet\[data\]"):
        open_data(f"parquet:{tmp_path}", RGB)


def test_a_data_set_of_the_hub(monkeypatch) -> None:
    """What the hub's loader gives is stood in for, so that no test needs the network."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "fine_label": datasets.ClassLabel(names=["ant", "bee"])})

    def rows(*values: int) -> datasets.Dataset:
        cells = {"image": [{"bytes": png(v), "path": None} for v in values], "fine_label": [v % 2 for v in values]}
        return datasets.Dataset.from_dict(cells, features=features)

    given = datasets.DatasetDict({"train": rows(1, 2, 3), "valid": rows(4, 5)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: given)
    data = open_data("hf:some/data", RGB, quiet=True)
    assert (data.labels, data.train.labels.tolist(), data.test.labels.tolist()) == (("ant", "bee"), [1, 0, 1], [0, 1])
    assert data.test.images[:, 0, 0, 0].tolist() == [4, 5]


def test_a_data_set_of_the_hub_that_cannot_be_reached_is_named(monkeypatch) -> None:
    import datasets

    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="no-such-owner/no-such-data") as caught:
        open_data("hf:no-such-owner/no-such-data", RGB)
    assert "\n" not in str(caught.value)


@pytest.fixture
def mnist_test_only(tmp_path) -> Path:
    source = SHARED / "mnist" / "test.parquet"
    if not source.is_file():
        pytest.skip(f"needs {source}")
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "test.parquet").symlink_to(source)
    return tmp_path / "mnist"


def test_mnist_has_its_published_label_counts(mnist_test_only) -> None:
    preparation = Preparation((28, 28), (0.1307,), (0.3081,))
    data = open_data(f"parquet:{mnist_test_only}", preparation, quiet=True)
    assert torch.bincount(data.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train is None
    assert abs(float(data.test.images.double().mean()) / 255 - 0.1325) < 1e-3  # known mean of the test set


@pytest.mark.slow
def test_cifar10_has_a_thousand_test_images_of_each_class() -> None:
    if not (SHARED / "cifar10").is_dir():
        pytest.skip(f"needs {SHARED / 'cifar10'}")
    data = open_data(f"parquet:{SHARED / 'cifar10'}", Preparation(), quiet=True)
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    mean = data.train.images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=1e-4, rtol=0)
