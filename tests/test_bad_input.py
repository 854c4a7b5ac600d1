"""Bad input: exit code 2, one sentence that says what and where, nothing half-written."""

from __future__ import annotations

import errno
import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import Ended, tersenet
from tersenet import models

FOLD = "steps: [fold_batch_norm]"
QUANTIZE = "steps: [quantize: {}]"
DECIDING = """\
from torch import nn
from tersenet.task import Preparation


class Deciding(nn.Module):
    preparation = Preparation(size=(8, 8), mean=(0.5,), std=(0.5,))

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(4, 10)

    def forward(self, x):
        y = self.conv(x).mean(dim=(2, 3))
        if y.sum() > 0:
            y = -y
        return self.linear(y)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty but for two recipes. Decoded images are cached in it, too."""
    (tmp_path / "fold.yaml").write_text(FOLD)
    (tmp_path / "int8.yaml").write_text(QUANTIZE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """The numbers of a digits net."""
    return {key: value.clone() for key, value in models.build("digits").state_dict().items()}


def compressed(*more: object, recipe: str = "fold.yaml", data: str = "digits", model: str = "digits") -> Ended:
    """`tersenet compress ... --out run`, which is refused; then nothing is there."""
    ended = tersenet("compress", model, "--data", data, "--recipe", recipe, "--out", "run", *more)
    assert ended.code == 2, (ended.out, ended.err)
    assert not Path("run").exists()
    return ended


# Weights


def test_missing_weights(here: Path) -> None:
    assert "there is no weights file none.pt" in compressed("--weights", "none.pt").sentence


def test_weights_with_other_names(here: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({key.replace("conv2", "second"): value for key, value in state.items()}, "other.safetensors")
    sentence = compressed("--weights", "other.safetensors").sentence
    assert "missing conv2." in sentence
    assert "unexpected second." in sentence
    many = {f"wrong{index}": torch.zeros(1) for index in range(9)}
    save_file(many, "many.safetensors")
    sentence = compressed("--weights", "many.safetensors").sentence
    assert "wrong0, wrong1, wrong2 and 6 more" in sentence


class Evil:
    """A pickle that leaves a file behind when it is executed."""

    def __reduce__(self) -> Any:
        return (open, ("executed", "w"))


@pytest.mark.parametrize("form", ["zip", "bare"])
def test_a_pickle_with_code_is_refused_and_not_executed(here: Path, form: str) -> None:
    if form == "zip":
        torch.save({"state_dict": Evil()}, "evil.pt")
    else:
        Path("evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    sentence = compressed("--weights", "evil.pt").sentence
    assert "refused" in sentence
    assert "nothing in it was executed" in sentence
    assert not Path("executed").exists()
    # It would have worked: the same bytes, read without care.
    if form == "bare":
        pickle.load(io.BytesIO(Path("evil.pt").read_bytes()))["state_dict"].close()
        assert Path("executed").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(here: Path, state: dict[str, torch.Tensor], value: float) -> None:
    key = next(key for key in state if key.endswith("conv2.weight"))
    state[key][0, 0, 0, 0] = value
    save_file(state, "bad.safetensors")
    sentence = compressed("--weights", "bad.safetensors").sentence
    assert key in sentence
    assert "NaN" in sentence or "infinite" in sentence


def test_damaged_weights(here: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, "cut.safetensors")
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:1000])
    assert "cut.safetensors is damaged" in compressed("--weights", "cut.safetensors").sentence


# Models


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("digts", ("there is no model 'digts'", "digits")),
        ("resnet21", ("near names", "resnet20")),
        ("none.pt2", ("none.pt2 cannot be read",)),
        ("none.terse", ("none.terse cannot be read",)),
        ("none.onnx", ("none.onnx does not exist",)),
        ("no.such.module:net", ("no Python module",)),
        ("json:dumps", ("could not be built",)),
    ],
)
def test_no_such_model(here: Path, model: str, words: tuple[str, ...]) -> None:
    sentence = compressed(model=model).sentence
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("command", ["compress", "plan", "profile", "pack"])
def test_control_flow_that_depends_on_the_data(here: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "deciding_net.py").write_text(DECIDING)
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "deciding_net", raising=False)
    more: dict[str, tuple[str, ...]] = {
        "compress": ("--data", "digits", "--recipe", "int8.yaml", "--out", "run"),
        "plan": ("--data", "digits", "--recipe", "int8.yaml"),
        "profile": (),
        "pack": ("-o", "model.terse"),
    }
    ended = tersenet(command, "deciding_net:Deciding", *more[command])
    line = DECIDING.splitlines().index("        if y.sum() > 0:") + 1
    assert f"{here / 'deciding_net.py'}, line {line} (if y.sum() > 0:)" in ended.sentence
    assert "depends on the values" in ended.sentence
    # torch would print the graph that it had captured so far.
    assert not any(word in ended.err + ended.out for word in ("class GraphModule", "aten.", "torch.fx", "def forward"))
    assert len(ended.err.splitlines()) <= 3
    assert not (here / "model.terse").exists()
    assert not list(here.glob("run/0*"))


# Recipes and options


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("steps: [quantise: {}]", ("unknown step 'quantise'", "'quantize'", "fold_batch_norm", "prune_channels")),
        ("steps: [prune_channels: {ratio: 0.5}]", ("ratio", "sparsity", "multiple_of")),
        ("steps: [prune_channels: {sparsity: 1.5}]", ("sparsity", "1.5")),
        ("steps: [prune_channels: {sparsity: lots}]", ("sparsity", "lots", "float")),
        ("steps: [quantize: {weights: int9}]", ("weights", "int9", "int8")),
        ("steps: []", ("at least one step",)),
        ("schema: 7\nsteps: [settle]", ("schema 7",)),
        ("steps: [settle\n", ("not valid YAML",)),
        ("steps: [!!python/object/apply:os.mkdir [made]]", ("not valid YAML",)),
        ("just words", ("must be a mapping",)),
        (b"\xff\xfe\x00\x01", ("recipe.yaml",)),
    ],
)
def test_a_recipe_that_cannot_be_read(here: Path, recipe: str | bytes, words: tuple[str, ...]) -> None:
    (here / "recipe.yaml").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    sentence = compressed(recipe="recipe.yaml").sentence
    assert all(word in sentence for word in ("recipe.yaml", *words)), sentence
    assert not (here / "made").exists()


def test_a_missing_recipe(here: Path) -> None:
    assert "none.yaml cannot be read" in compressed(recipe="none.yaml").sentence


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ("either", "--recipe", "--macs")),
        ("--recipe fold.yaml --macs 0.5x", ("either", "--recipe", "--macs")),
        ("--macs half", ("'half'", "0.5x")),
        ("--macs 1.5x", ("1.5x", "0.5x")),
        ("--macs 0x", ("0x",)),
        ("--macs nanx", ("nanx",)),
        ("--macs 0.5x --runtime tensorrt", ("'tensorrt'", "onnxruntime", "openvino")),
        ("--macs 0.5x --runtime ,", ("no runtime",)),
        ("--macs 0.5x --image-size big", ("--image-size", "'big'", "180x240")),
        ("--macs 0.5x --image-size 0x8", ("--image-size",)),
        ("--macs 0.5x --image-size 8x8x8", ("--image-size",)),
        ("--macs 0.5x --mean a,b", ("--mean", "'a,b'")),
        ("--macs 0.5x --mean 0.5,0.5", ("mean has 2 values", "takes 1 channel")),
        ("--macs 0.5x --mean 127.5", ("127.5", "scaled to [0, 1]", "--mean 0.5")),
        ("--macs 0.5x --std 0", ("std must be positive",)),
        ("--macs 0.5x --columns img", ("--columns", "img,label")),
        ("--macs 0.5x --on-bad-image ignore", ("--on-bad-image", "skip, stop")),
        ("--macs 0.5x --seed -1", ("seed", "-1")),
        ("--macs 0.5x --resume", ("--resume found no run in run",)),
    ],
)
def test_options_that_make_no_sense(here: Path, line: str, words: tuple[str, ...]) -> None:
    ended = tersenet("compress", "digits", "--data", "digits", "--out", "run", *line.split())
    assert all(word in ended.sentence for word in words), ended.sentence
    assert not (here / "run").exists()


# Data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("digitz", ("'digitz'", "digits", "parquet:DIR", "folder:DIR")),
        ("folder:none", ("there is no folder none",)),
        ("folder:empty", ("empty has no class folders", "0 samples")),
        ("folder:hollow", ("holds no images", "0 samples", "cats")),
        ("parquet:empty", ("no parquet file",)),
        ("random:8x8", ("random:CxHxW",)),
        ("random:3x8x8", ("3 channels", "takes 1")),
    ],
)
def test_data_that_is_not_there(here: Path, data: str, words: tuple[str, ...]) -> None:
    (here / "empty").mkdir()
    (here / "hollow" / "cats").mkdir(parents=True)
    sentence = compressed(data=data).sentence
    assert all(word in sentence for word in words), sentence


@pytest.fixture
def photos(here: Path, digit_images: list[Path]) -> Path:
    """A folder per class with three images each, and in the second class one that is none."""
    for name in "ab":
        folder = here / "photos" / name
        folder.mkdir(parents=True)
        for index in range(3):
            (folder / f"{index}.png").write_bytes(digit_images[index].read_bytes())
    whole = digit_images[3].read_bytes()
    (here / "photos" / "b" / "torn.png").write_bytes(whole[: len(whole) // 2])
    return here / "photos"


def test_a_corrupt_image_is_named(photos: Path) -> None:
    ended = compressed(data="folder:photos")
    assert "b/torn.png" in ended.sentence
    assert "--on-bad-image skip" in ended.sentence
    assert "0x" not in ended.sentence  # no address in memory
    assert len(ended.err.strip().splitlines()) <= 2


@pytest.mark.minutes
def test_a_corrupt_image_is_skipped_on_request(photos: Path) -> None:
    ended = tersenet(
        "plan", "digits", "--data", "folder:photos", "--recipe", "fold.yaml", "--on-bad-image", "skip", "--json", "-q"
    )
    assert ended.code == 0, ended.err
    assert "b/torn.png" in ended.err
    assert ended.err.startswith("warning: 1 ")
    assert len(ended.json["rows"]) == 2


@pytest.fixture
def table(here: Path, digit_images: list[Path]) -> Any:
    """Writes data/train.parquet and data/test.parquet with these labels."""
    datasets = pytest.importorskip("datasets")

    def write(labels: list[int], name: str = "train") -> None:
        images = [{"bytes": digit_images[index % 10].read_bytes(), "path": None} for index in range(len(labels))]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        (here / "data").mkdir(exist_ok=True)
        made = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        made.to_parquet(str(here / "data" / f"{name}.parquet"))

    return write


# `datasets` leaves its own file handles to the garbage collector.
closing = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@closing
@pytest.mark.parametrize(
    ("labels", "words"),
    [([*range(10), -1], ("train", "-1 to 9", "0 to 9")), ([*range(11)], ("train", "0 to 10", "10 classes"))],
)
def test_labels_out_of_range(table: Any, labels: list[int], words: tuple[str, ...]) -> None:
    table(labels)
    table([0, 1], "test")
    sentence = compressed(data="parquet:data").sentence
    assert all(word in sentence for word in ("label column", *words)), sentence


@closing
def test_no_samples_to_calibrate_on(table: Any, here: Path) -> None:
    table([])
    table([0, 1], "test")
    sentence = compressed(data="parquet:data", recipe="int8.yaml").sentence
    assert "train" in sentence
    assert "0 samples" in sentence
    (here / "none.yaml").write_text("steps: [quantize: {samples: 0}]")
    assert "samples" in compressed(recipe="none.yaml").sentence


def test_a_target_on_data_without_labels(here: Path) -> None:
    sentence = compressed("--max-drop", "1", data="random:1x8x8").sentence
    assert "max_drop" in sentence
    assert "labelled" in sentence
    (here / "train.yaml").write_text("steps: [fold_batch_norm, train: {epochs: 1}]")
    sentence = compressed(data="random:1x8x8", recipe="train.yaml").sentence
    assert "no labelled training data for train" in sentence
    assert "remain: fold_batch_norm" in sentence


# Files and runs


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("measure none.onnx", ("there is no file none.onnx",)),
        ("measure junk.onnx", ("cannot open junk.onnx",)),
        ("measure notes.txt", ("no runtime reads notes.txt", ".onnx")),
        ("measure junk.onnx --runtime tensorrt", ("'tensorrt'", "onnxruntime")),
        ("measure junk.onnx --runtime pytorch", ("junk.onnx",)),
        ("predict none.onnx a.png", ("there is no file none.onnx",)),
        ("predict junk.onnx a.png", ("junk.onnx",)),
        ("unpack none.terse -o a.pt2", ("none.terse cannot be read",)),
        ("unpack junk.terse -o a.pt2", ("junk.terse",)),
        ("pack digits -o a.zip", ("a.zip", ".terse")),
        ("pack none -o a.terse", ("there is no model 'none'",)),
        ("export none --to onnx", ("none",)),
        ("export junk.terse --to onnx", ("junk.terse",)),
        ("export junk.terse --to tpu", ("tpu", "onnx, openvino, tensorrt, torch, terse, litert")),
        ("check none --max-drop 1", ("there is no folder none",)),
        ("check none.onnx --max-drop 1", ("there is no file none.onnx",)),
        ("check folder --max-drop 1", ("folder holds no run",)),
        ("check folder", ("nothing to check",)),
        ("report none", ("there is no folder none",)),
        ("report folder", ("folder holds no run",)),
        ("profile junk.pt2", ("junk.pt2",)),
    ],
)
def test_files_and_runs_that_are_not_there(here: Path, line: str, words: tuple[str, ...]) -> None:
    (here / "folder").mkdir()
    for name in ("junk.onnx", "junk.terse", "junk.pt2"):
        (here / name).write_bytes(b"this is no model" * 10)
    before = sorted(here.iterdir())
    sentence = tersenet(*line.split()).sentence
    assert all(word in sentence for word in words), sentence
    assert sorted(here.iterdir()) == before


def test_compress_does_not_write_into_a_folder_of_something_else(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "thesis.tex").write_text("years of work")
    ended = tersenet("compress", "digits", "--data", "digits", "--recipe", "fold.yaml", "--out", "run")
    assert "run is not empty" in ended.sentence
    assert [path.name for path in (here / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.minutes
def test_a_full_disk_and_then_a_second_call(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "two.yaml").write_text("steps: [prune_channels: {sparsity: 0.25}, fold_batch_norm]")
    arguments = ("compress", "digits", "--data", "random:1x8x8", "--recipe", "two.yaml", "--out", "run")
    real = os.fsync

    def full(descriptor: int) -> None:
        if (here / "run" / "01-prune_channels.json").exists():  # the first step is finished, the second begins
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in tersenet(*arguments).sentence
    monkeypatch.setattr(os, "fsync", real)
    assert sorted(path.name for path in (here / "run").iterdir()) == [
        "01-prune_channels.json", "01-prune_channels.safetensors", "files", "run.json",
    ]  # fmt: skip
    first = load_file("run/01-prune_channels.safetensors")
    ended = tersenet(*arguments, "--resume")
    assert ended.code == 0, ended.err
    assert "going on after 1 finished step" in ended.err
    again = load_file("run/01-prune_channels.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in first.items())
