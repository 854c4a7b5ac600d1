"""Data that changed anywhere is another run, and another score: never "finished already"."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from cases import tiny
from pictures import class_folders
from tersenet import Preparation, Quantize, Task, compress
from tersenet.data import TensorBatches, open_data
from tersenet.errors import RunError
from tersenet.scored_on import data_digest, scored_on

X = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 4
BYTES = (X * 40 + 128).clamp(0, 255).to(torch.uint8)
PREPARATION = Preparation((12, 12), (0.5,) * 3, (0.5,) * 3)


def changed(values: torch.Tensor, at: int) -> torch.Tensor:
    values = values.clone()
    values[at].view(-1)[-1:].add_(1)
    return values


def batches(images: torch.Tensor = BYTES, labels: torch.Tensor = Y, **settings: Any) -> TensorBatches:
    return TensorBatches(images, labels, 2, PREPARATION, **settings)


def loader(x: torch.Tensor = X, y: torch.Tensor = Y, inner: Any = lambda found: found) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)  # which each reading moves on
    return DataLoader(inner(TensorDataset(x, y)), batch_size=4, shuffle=True, generator=generator)


@pytest.mark.parametrize("at", range(0, 64, 9))
def test_one_value_anywhere_counts(at: int) -> None:
    train, listed = batches(shuffle=True, augment="crop"), list(zip(X.split(4), Y.split(4), strict=True))
    assert data_digest(train) == data_digest(batches(BYTES.clone(), shuffle=True, augment="crop"))
    assert data_digest(train) != data_digest(batches(changed(BYTES, at), shuffle=True, augment="crop"))
    assert data_digest(train) != data_digest(
        batches(BYTES, changed(Y[:, None], at)[:, 0], shuffle=True, augment="crop")
    )
    assert data_digest(listed) != data_digest(list(zip(changed(X, at).split(4), Y.split(4), strict=True)))
    for inner in (
        lambda found: found,
        lambda found: Subset(found, range(64)),
        lambda found: ConcatDataset([found] * 2),
    ):
        same = loader(inner=inner)
        digest = data_digest(same, read=False)
        list(same)
        assert digest == data_digest(same, read=False) == data_digest(loader(inner=inner), read=False)
        assert digest != data_digest(loader(changed(X, at), inner=inner), read=False)


def test_files_of_a_data_set_count_by_their_sizes_and_times(tmp_path: Path) -> None:
    class Folder(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.samples = [(str(path), 0) for path in sorted(tmp_path.iterdir())]
            self.seen: list[int] = []

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> int:
            self.seen.append(index)
            return index

    for name in "ab":
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1e9, 1e9))
    data = DataLoader(Folder(), shuffle=True)
    before = data_digest(data, read=False)
    list(data)
    assert before == data_digest(data, read=False)
    (tmp_path / "b").write_text("c")
    assert before != data_digest(data, read=False)


def test_a_folder_is_known_by_the_bytes_of_its_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", {"red": "red", "blue": "blue"}, 6)
    found = open_data(f"folder:{tmp_path / 'data'}", PREPARATION)
    again = open_data(f"folder:{tmp_path / 'data'}", PREPARATION)
    parts = ("train", "calibrate", "test")
    assert [getattr(found, part).digest() for part in parts] == [getattr(again, part).digest() for part in parts]
    assert found.train is not None
    assert found.train.contents is not None, "which spares reading the images again"
    part = found.train.subset(3, seed=0)
    assert part.digest() != found.train.subset(3, seed=1).digest()
    for path in (tmp_path / "data" / "red").iterdir():
        path.write_bytes(next((tmp_path / "data" / "blue").iterdir()).read_bytes())
    other = open_data(f"folder:{tmp_path / 'data'}", PREPARATION)
    assert all(getattr(found, part).digest() != getattr(other, part).digest() for part in parts)


def test_a_finished_run_of_other_training_data_is_refused(tmp_path: Path) -> None:
    def job(x: torch.Tensor) -> None:
        task = Task(example=X[:2], calibrate=[(part,) for part in x.split(16)], quiet=True)
        compress(tiny(0), task, [Quantize(activations=None)], out=tmp_path / "run")

    job(X)
    job(X.clone())
    with pytest.raises(RunError, match="holds a run with another data"):
        job(changed(X, 40))


def test_a_score_of_another_test_set_is_another() -> None:
    task = Task(example=X[:2], test=batches())
    assert scored_on(task) == scored_on(dataclasses.replace(task, test=batches(BYTES.clone())))
    found = [scored_on(dataclasses.replace(task, test=batches(changed(BYTES, at)))) for at in range(1, 64)]
    assert len({scored_on(task), *found}) == 64


def test_batches_that_nothing_is_known_of_count_by_their_number() -> None:
    class Made:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[torch.Tensor]:
            raise AssertionError("it is not read, since it may give others each time")

    assert data_digest(Made(), read=False) == data_digest(Made(), read=False)
