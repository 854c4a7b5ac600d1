"""How inputs are prepared where nothing says it: by trial, and said; and what users and files say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tersenet.deploy.artifact import _preparation, save_terse, terse_preparation
from tersenet.deploy.onnx import export_onnx
from tersenet.errors import InputWarning, SettingsError
from tersenet.files import measure_files
from tersenet.inputs_said import inputs_said
from tersenet.models import IMAGENET_MEAN, IMAGENET_STD
from tersenet.predict import predict_images
from tersenet.preparations import Preparing, chosen_preparation
from tersenet.sources import open_task
from tersenet.task import Preparation, Task

SHADES = {"a": 40, "b": 90, "c": 140, "d": 200}


def shades(root: Path, size: int = 12) -> str:
    """Classes that differ by how bright they are, a little noisy, so that a wrong scale confuses them."""
    generator = np.random.default_rng(0)
    for name, shade in SHADES.items():
        for number in range(12):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = generator.integers(-8, 9, (size, size, 3))
            Image.fromarray((shade + noise).clip(0, 255).astype(np.uint8)).save(path)
    return f"folder:{root}"


class Bright(nn.Module):
    """Right where its inputs are prepared with one mean and std: the nearest of the four shades, at one size."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int) -> None:
        super().__init__()
        self.size, self.first = size, nn.Conv2d(3, 3, 1)
        self.mean, self.std = mean, std
        shade = torch.tensor(list(SHADES.values())) / 255
        self.register_buffer("centers", (shade[:, None] - torch.tensor(mean)) / torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            raise ValueError("another size")
        return -(x.mean((2, 3))[:, None] - self.centers).square().sum(-1)


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1 / 255,) * 3)]
)
def test_the_model_is_asked_how_it_was_trained(mean: tuple, std: tuple, tmp_path: Path) -> None:
    data = shades(tmp_path, 12)
    with pytest.warns(InputWarning, match=r"nothing says how .* 100\.0 % of .* training images right, the next best"):
        task = open_task(Bright(mean, std, 12), Preparation.unknown(), data, quiet=True)
    assert task.preparation.size == (12, 12), "all images have this size"
    assert task.preparation.mean == mean
    assert task.preparation.std == std
    assert tuple(task.example.shape[1:]) == (3, 12, 12)


def test_what_is_given_is_not_tried(tmp_path: Path) -> None:
    data, model = shades(tmp_path, 12), Bright((0.2,) * 3, (0.3,) * 3, 12)
    given = Preparing(mean=(0.2,) * 3, std=(0.3,) * 3).applied(Preparation.unknown())
    assert given.assumed == ("size",)
    with pytest.warns(InputWarning, match="3x12x12 with mean 0.2 and std 0.3 is used"):
        assert open_task(model, given, data, quiet=True).preparation.mean == (0.2,) * 3
    complete = Preparing(mean=(0.2,) * 3, std=(0.3,) * 3, size=(12, 12)).applied(Preparation.unknown())
    assert open_task(model, complete, data, quiet=True).preparation == Preparation((12, 12), (0.2,) * 3, (0.3,) * 3,
                                                                                  tuple("abcd"))  # fmt: skip


def test_without_labels_the_assumption_stands() -> None:
    with pytest.warns(InputWarning, match=r"prepared: 3x32x32 with mean 0\.5 and std 0\.5 is assumed; give --mean"):
        found = chosen_preparation(lambda x: x.mean((2, 3)), Preparation.unknown(), "random:3x32x32")
    assert found.assumed == ("size", "mean", "std")


def test_photographs_are_not_tried_as_they_are(tmp_path: Path) -> None:
    """All of one camera have one size, and so many of them would fill the memory."""
    data = shades(tmp_path, 640)
    seen: list[tuple[int, ...]] = []

    def answers(x: Tensor) -> dict[str, Tensor]:
        seen.append(tuple(x.shape[2:]))
        return {"logits": Bright((0.0,) * 3, (1.0,) * 3, x.shape[-1])(x)}

    with pytest.warns(InputWarning, match="mean 0 and std 1 is used"):
        found = chosen_preparation(answers, Preparation.unknown(), data)
    assert set(seen) == {(32, 32), (224, 224)}
    assert found.assumed == ()


def test_what_is_only_assumed_does_not_become_a_fact_in_a_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    path = tmp_path / "model.terse"
    save_terse(model, torch.zeros(2, 3, 12, 12), path, Preparation.unknown((12, 12)))
    assert terse_preparation(path).assumed == ("size", "mean", "std")
    known = Preparation((12, 12), (0.5,) * 3, (0.5,) * 3, interpolation="bicubic", crop=0.5)
    save_terse(model, torch.zeros(2, 3, 12, 12), path, known)
    assert terse_preparation(path) == known
    assert Preparation.of_metadata(known.metadata()) == known
    unknown = Preparation.of_metadata(Preparation.unknown().metadata())
    assert unknown is not None
    assert unknown.assumed == ("size", "mean", "std")


@pytest.mark.parametrize("changed", [{"assumed": [[1]]}, {"assumed": "mean"}, {"crop": 0}, {"interpolation": []}])
def test_a_damaged_preparation_is_refused(changed: dict) -> None:
    with pytest.raises(ValueError, match="its preparation is malformed"):
        _preparation({**Preparation().to_json(), **changed})


def test_a_constant_answer_is_no_trial_that_tells(tmp_path: Path) -> None:
    """Nine of ten images are of one class: who always says it is right so often."""
    generator = np.random.default_rng(0)
    for name, count in (("many", 54), ("few", 6)):
        for number in range(count):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    constant = torch.tensor([0.0, 1.0])
    with pytest.warns(InputWarning, match="does better than guessing"):
        chosen_preparation(lambda x: constant.expand(len(x), 2), Preparation.unknown(), f"folder:{tmp_path}")


def test_what_is_used_is_said(tmp_path: Path) -> None:
    preparation = Preparing(size=(12, 12), interpolation="bicubic", crop=0.9).applied(
        Preparation((8, 8), (0.1, 0.2, 0.3), (0.5,) * 3, source="the file")
    )
    task = open_task(Bright((0.5,) * 3, (0.5,) * 3, 12), preparation, shades(tmp_path), quiet=True)
    inputs, data = inputs_said(task)
    assert inputs == (
        "inputs: 3x12x12 with mean 0.1,0.2,0.3 and std 0.5, bicubic, crop 0.9 (size, interpolation, crop as given, "
        "else the file)"
    )
    assert data == "data: 40 training samples, 40 calibration samples, 8 test samples; 4 classes: a, b, c, d"
    loader = torch.utils.data.DataLoader(list(range(7)), batch_size=2)
    bare = Task(example=torch.zeros(2, 5), train=loader, calibrate=iter([]))
    assert inputs_said(bare) == ["inputs: 5", "data: 7 training samples, some calibration samples"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"crop": 0.0}, "crop is 0.0; give the share"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; allowed: nearest, bilinear, bicubic, lanczos"),
        ({"mean": (0.5,)}, "mean has 1 value"),
        ({"std": (58.0, 57.0, 57.0)}, "divide it by 255"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        Preparing(**given).applied(Preparation.unknown())


def foreign(path: Path, size: int | None = 12) -> Path:
    """An ONNX file that says nothing of its inputs, for any size where none is given."""
    import onnx

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # the nearest shade: x s - s^2 / 2 of the mean s of a class, at mean 0.2 and std 0.3
        shade = (torch.tensor(list(SHADES.values())) / 255 - 0.2) / 0.3
        model[0].weight.copy_((shade / 3)[:, None, None, None].expand(4, 3, 1, 1))
        model[0].bias.copy_(-shade.square() / 2)
    export_onnx(model, torch.zeros(2, 3, 12, 12), path)
    proto = onnx.load(path)
    del proto.metadata_props[:]
    if size is None:
        for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_param = "any"
        del proto.graph.value_info[:]
    onnx.save(proto, path)
    return path


def test_files_of_other_makers_are_scored_as_the_user_says(tmp_path: Path) -> None:
    path, data = foreign(tmp_path / "foreign.onnx"), shades(tmp_path / "data")
    with pytest.warns(InputWarning, match="nothing says how the model's inputs are prepared"):
        measure_files([path], None, data, quiet=True)
    said = Preparing(mean=(0.2,) * 3, std=(0.3,) * 3)
    assert measure_files([path], None, data, preparing=said, quiet=True)["files"][str(path)]["score"] == 1.0
    image = tmp_path / "data" / "c" / "0.png"
    assert predict_images(path, [image], preparing=said)[str(image)][0]["index"] == 2
    with pytest.warns(InputWarning, match="is assumed"):
        predict_images(path, [image])


def test_files_for_any_size_are_measured_at_the_size_that_is_given(tmp_path: Path) -> None:
    path = foreign(tmp_path / "any.onnx", None)
    with pytest.raises(SettingsError, match=r"takes inputs of any size .* --image-size"):
        measure_files([path], quiet=True)
    found = measure_files([path], preparing=Preparing(size=(16, 20)), quiet=True)
    assert math.isfinite(found["files"][str(path)]["latency_ms"]["onnxruntime"]["median"])
