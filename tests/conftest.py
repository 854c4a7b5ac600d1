"""What several tests of the command line share: trained digits, and one finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from command import DigitsRun, tersenet
from tersenet import models
from tersenet.models.weights import save_weights
from tersenet.sources import open_task
from tersenet.train import Train

RECIPE = """\
schema: 1
steps:
- prune_channels: {sparsity: 0.25, multiple_of: 8}
- train: {epochs: 1}
- fold_batch_norm: {}
- quantize: {}
"""


@pytest.fixture(scope="session")
def digits_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits net after four epochs, which is enough to be right most of the time."""
    folder = tmp_path_factory.mktemp("digits")
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        model = models.build("digits")
    task = open_task(model, models.reference("digits").preparation, "digits", batch_size=64, quiet=True)
    Train(epochs=4, optimizer="adam", learning_rate=3e-3, logger="none").run(model, task)
    path = folder / "digits.safetensors"
    save_weights(model, path)
    return path


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, digits_weights: Path) -> DigitsRun:
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    ended = tersenet(
        "compress", "digits", "--weights", digits_weights, "--data", "digits", "--recipe", recipe,
        "--out", folder / "run", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    return DigitsRun(folder / "run", digits_weights, recipe, ended)


@pytest.fixture(scope="session")
def digit_images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first ten digits of scikit-learn, which are 0 to 9, as image files."""
    image = pytest.importorskip("PIL.Image")
    datasets = pytest.importorskip("sklearn.datasets")
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for index, grey in enumerate(datasets.load_digits().images[:10]):
        paths.append(folder / f"{index}.png")
        image.fromarray((grey * 255 / 16).round().astype("uint8")).save(paths[-1])
    return paths
