"""How inputs are prepared, and whether data fits a model: what cannot be meant is refused, what is odd is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from command import tersenet
from pictures import class_folders
from tersenet import models
from tersenet.deploy.artifact import save_terse
from tersenet.errors import DataError, InputWarning, ModelError, SettingsError
from tersenet.files import measure_files
from tersenet.inputs_said import near_chance
from tersenet.models.sources import open_model
from tersenet.preparations import Preparing
from tersenet.sources import example_of, open_task
from tersenet.task import Preparation, Score, Task

GREY = Preparation((8, 8), (0.3,), (0.4,))
RGB = Preparation((8, 8), (0.3,) * 3, (0.4,) * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path_factory.mktemp("cache")))


def classifier(outputs: int, channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs)
    )


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((127.5,), None, r"mean is 127\.5, but pixels are scaled to \[0, 1\] .* divide it by 255: --mean 0\.5"),
        ((-0.1,), None, "give it as a share of white"),
        ((float("nan"),), None, "mean is nan"),
        (None, (64.0,), r"std is 64, .*--std 0\.251"),
        (None, (0.0,), "std must be positive, got 0"),
        (None, (float("nan"),), "std must be positive"),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), r"mean has 3 values \(0\.5,0\.5,0\.5\) and the model takes 1 channel;"),
    ],
)
def test_means_and_deviations_that_cannot_be_meant(mean, std, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Preparing(mean, std).applied(GREY)


def test_labels_without_an_output_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": "red", "b": "lime", "c": "blue"})
    with pytest.raises(DataError, match=r"has 3 classes and the model has 2 outputs, none for class 2 \(c\)"):
        open_task(classifier(2), RGB, f"folder:{tmp_path}", quiet=True)


def test_outputs_without_a_class_are_said(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": "red", "b": "lime"})
    with pytest.warns(InputWarning, match="images of 2 classes and the model has 5 outputs"):
        task = open_task(classifier(5), RGB, f"folder:{tmp_path}", quiet=True)
    assert task.preparation.labels == ("a", "b")


def test_one_class_and_one_plain_value_are_said(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": "black"}, 3)
    with pytest.warns(InputWarning) as said:
        open_task(classifier(2), RGB, f"folder:{tmp_path}", quiet=True)
    words = [str(each.message) for each in said]
    assert any("test images of" in each and "are of one class" in each for each in words)
    assert any("for calibration have the value 0 everywhere" in each for each in words)


def test_a_single_image_makes_an_example_of_two(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": "red", "b": "lime"}, 1)
    (tmp_path / "train" / "b" / "0.png").unlink()
    (tmp_path / "train" / "b").rmdir()
    assert open_task(classifier(2), RGB, f"folder:{tmp_path}", quiet=True).example.shape == (2, 3, 8, 8)


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", {"a": "red", "b": "lime"})
    model, path = classifier(2), tmp_path / "teacher.terse"
    labelled = Preparation(RGB.size, RGB.mean, RGB.std, ("b", "a"))
    save_terse(model.eval(), example_of(RGB), path, labelled)
    task = open_task(classifier(2), RGB, f"folder:{tmp_path / 'data'}", quiet=True)
    assert task.open_model is not None
    with pytest.raises(ModelError, match="classes b, a, the data has a, b"):
        task.open_model(str(path))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_grey.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def grey():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))\n\n"
        "def half():\n    return grey().half()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_grey", raising=False)
    return "own_grey"


def test_channels_follow_from_the_model(own: str) -> None:
    assert open_model(f"{own}:grey")[1].channels == 1


def test_half_precision_is_made_single_and_said(own: str) -> None:
    with pytest.warns(InputWarning, match=r"computes in torch\.float16 and was converted to torch\.float32"):
        model, _ = open_model(f"{own}:half")
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_a_preparation_that_is_assumed_is_said(own: str) -> None:
    line = ("plan", f"{own}:grey", "--data", "digits", "--recipe", "fold.yaml", "-q", "--json")
    Path("fold.yaml").write_text("steps: [fold_batch_norm]")
    said = tersenet(*line).err
    assert "nothing says how the model's inputs are prepared, and none of 12 common preparations does better" in said
    assert "1x32x32 with mean 0.5 and std 0.5 is assumed; give --mean, --std and --image-size" in said
    said = tersenet(*line, "--mean", "0.3", "--std", "0.4", "--image-size", "8").err
    assert "nothing says" not in said


def test_a_file_is_scored_by_the_names_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two files with one network, the one that calls its outputs otherwise is right where the other is wrong."""
    class_folders(tmp_path / "data" / "test", {"a": "red", "b": "lime", "c": "blue"})
    network = nn.Sequential(nn.Conv2d(3, 3, 8, bias=False), nn.Flatten(), nn.Identity())
    with torch.no_grad():  # the sum of each color
        network[0].weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8))
    for name, labels in (("right", ("a", "b", "c")), ("turned", ("b", "c", "a")), ("other", ("x", "y", "z"))):
        save_terse(
            network.eval(), example_of(RGB), tmp_path / f"{name}.terse", Preparation((8, 8), RGB.mean, RGB.std, labels)
        )
    data = f"folder:{tmp_path / 'data'}"
    scores = {}
    for name in ("right", "turned"):
        path = tmp_path / f"{name}.terse"
        found = measure_files([path], ["pytorch"], data, quiet=True)
        scores[name] = found["files"][str(path)]["score"]
    assert scores == {"right": 1.0, "turned": 0.0}
    with pytest.raises(
        DataError, match=r"3 of its 3 classes that .*other\.terse does not know \(a, b, c\); it knows x, y, z"
    ):
        measure_files([tmp_path / "other.terse"], ["pytorch"], data, quiet=True)


def test_labels_of_a_reference_model_do_not_win(tmp_path: Path) -> None:
    class_folders(tmp_path, {"apple": "white", "banana": "gray"})
    model, preparation = models.build("digits"), models.reference("digits").preparation
    with pytest.warns(InputWarning, match="2 classes and the model has 10 outputs"):
        task = open_task(model, preparation, f"folder:{tmp_path}", quiet=True)
    assert task.preparation.labels == ("apple", "banana")


@pytest.mark.parametrize(
    ("low", "classes", "said"), [(0.08, 10, True), (0.12, 10, False), (0.4, 2, True), (0.1, 0, False)]
)
def test_an_original_at_chance_level_is_said(low: float, classes: int, said: bool) -> None:
    labels = tuple(map(str, range(classes)))
    task = Task(example=torch.zeros(2, 1, 8, 8), preparation=Preparation((8, 8), (0.5,), (0.5,), labels))
    model = classifier(max(classes, 1), channels=1)
    score = Score(low + 0.02, low, low + 0.05, 1000)
    sentence = near_chance(score, model, task)
    assert (sentence is not None) == said
    assert near_chance(None, model, task) is None
    unnamed = Task(example=task.example)  # then the outputs tell how many classes there are
    assert near_chance(score, model, unnamed) == sentence
    if sentence is not None:
        assert "THE ORIGINAL SCORES NO BETTER THAN GUESSING" in sentence
        assert f"guessing among {classes} classes scores {100 / classes:.1f} %" in sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_data_must_be_finite(value: float) -> None:
    batches = [torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), value)]
    with pytest.raises(DataError, match="calibration batch 1 holds NaN or infinite values"):
        list(Task(example=batches[0], calibrate=batches).calibration())
