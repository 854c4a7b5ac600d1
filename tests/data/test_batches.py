"""Batches: the same for the same (epoch, start), normalised, augmented image by image, torch's randomness untouched."""

from __future__ import annotations

import itertools

import pytest
import torch

from tersenet.data import TensorBatches
from tersenet.errors import DataError, SettingsError
from tersenet.task import Preparation, Resumable, batches_at

PREPARATION = Preparation((8, 8), (0.25, 0.5, 0.75), (0.5, 0.25, 1.0))


def batches(samples: int = 20, **changes) -> TensorBatches:
    images = torch.randint(0, 256, (samples, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    settings = {"batch_size": 6, "preparation": PREPARATION, **changes}
    return TensorBatches(images, torch.arange(samples), **settings)


def same(left, right) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_normalisation_is_that_of_the_preparation() -> None:
    data = batches()
    x, y = next(iter(data))
    for channel, (mean, std) in enumerate(zip(PREPARATION.mean, PREPARATION.std, strict=True)):
        expected = (data.images[:6, channel].double() / 255 - mean) / std
        torch.testing.assert_close(x[:, channel].double(), expected, atol=1e-6, rtol=0)
    assert (x.dtype, y.tolist()) == (torch.float32, list(range(6)))


@pytest.mark.parametrize("augment", [None, "crop", "crop_flip"])
def test_an_epoch_can_be_started_anywhere(augment) -> None:
    data = batches(shuffle=True, augment=augment, seed=3)
    torch.manual_seed(98)  # torch's own seed differs between the two readings, whatever test ran before
    whole = list(data.at(5))
    torch.manual_seed(99)
    list(data.at(0))
    for start in range(len(data) + 1):
        assert same(data.at(5, start), whole[start:])
    assert same(batches(shuffle=True, augment=augment, seed=3).at(5, 2), whole[2:])
    assert isinstance(data, Resumable)
    assert same(batches_at(data, 5, 1), whole[1:])


def test_epochs_and_seeds_differ() -> None:
    order = {
        (seed, epoch): tuple(torch.cat([y for _, y in batches(shuffle=True, seed=seed).at(epoch)]).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(order.values())) == 4
    assert all(sorted(labels) == list(range(20)) for labels in order.values())


@pytest.mark.parametrize("augment", [None, "crop_flip"])
def test_torch_random_numbers_are_neither_used_nor_moved(augment) -> None:
    data = batches(shuffle=True, augment=augment)
    torch.manual_seed(12344)
    state = torch.random.get_rng_state()
    first = list(data)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(12345)
    assert same(data, first)


def windows(image: torch.Tensor, padding: int, flip: bool) -> list[torch.Tensor]:
    """Every crop of a padded image, by slicing, and its mirror."""
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    side = image.shape[-1]
    crops = [padded[:, i : i + side, j : j + side] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
    return crops + [crop.flip(-1) for crop in crops] if flip else crops


@pytest.mark.parametrize(("augment", "flip"), [("crop", False), ("crop_flip", True)])
def test_augmented_images_are_crops_of_the_padded_image(augment, flip) -> None:
    data = batches(samples=200, batch_size=200, augment=augment)
    x, _ = next(iter(data))
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPARATION.mean, PREPARATION.std))
    pixels = (x * std + mean) * 255
    chosen = []
    for image, result in zip(data.images.float(), pixels, strict=True):
        matches = [i for i, crop in enumerate(windows(image, 1, flip)) if torch.allclose(crop, result, atol=1e-2)]
        assert len(matches) == 1
        chosen.append(matches[0])
    assert set(chosen) == set(range(18 if flip else 9))  # every shift, drawn for each image apart
    if flip:
        assert 70 <= sum(choice >= 9 for choice in chosen) <= 130


def test_every_batch_of_every_epoch_is_augmented_anew() -> None:
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    data = TensorBatches(image.expand(400, -1, -1, -1), None, 100, PREPARATION, augment="crop_flip")
    results = [x for epoch in (0, 1) for (x,) in data.at(epoch)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(results, 2))


def test_padding_is_an_eighth() -> None:
    images = torch.full((300, 1, 32, 32), 255, dtype=torch.uint8)
    data = TensorBatches(images, None, 300, Preparation((32, 32), (0.0,), (1.0,)), augment="crop")
    (x,) = next(iter(data))
    black = (x == 0).all(dim=-1).sum(dim=(1, 2))  # rows that came from the border
    assert int(black.max()) == 4
    (x,) = next(iter(data.like(augment="crop:2")))
    assert int((x == 0).all(dim=-1).sum(dim=(1, 2)).max()) == 2


@pytest.mark.parametrize("augment", ["auto", "crop:", "crop:-1", "flip", "crop_flip:x"])
def test_other_augmentations_are_refused(augment: str) -> None:
    with pytest.raises(SettingsError, match="allowed: none, crop, crop_flip"):
        batches(augment=augment)


def test_lengths_and_the_last_batch() -> None:
    assert [len(x) for x, _ in batches()] == [6, 6, 6, 2]
    assert [len(x) for x, _ in batches(drop_last=True)] == [6, 6, 6]
    assert (len(batches()), len(batches(drop_last=True)), batches().samples) == (4, 3, 20)


def test_subset_and_split_are_drawn_from_the_seed() -> None:
    data = batches()
    part = data.subset(7, seed=4)
    assert part.samples == 7
    assert torch.equal(part.labels, data.subset(7, seed=4).labels)
    assert not torch.equal(part.labels, data.subset(7, seed=5).labels)
    assert torch.equal(part.images, data.images[part.labels])
    left, right = data.split(0.3, seed=4)
    assert (left.samples, right.samples) == (6, 14)
    assert sorted(left.labels.tolist() + right.labels.tolist()) == list(range(20))
    with pytest.raises(SettingsError, match="both sides"):
        data.split(0.0, seed=0)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch_size": 0}, SettingsError, "batch_size"),
        ({"seed": -1}, SettingsError, "seed"),
        ({"augment": "mixup"}, SettingsError, "crop_flip"),
        ({"samples": 0}, DataError, "0 samples"),
        ({"preparation": Preparation((8, 8), (0.5,), (0.5,))}, DataError, "3 channels"),
    ],
)
def test_wrong_settings_are_refused(changes, error, words) -> None:
    with pytest.raises(error, match=words):
        batches(**changes)


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(DataError, match="uint8"):
        TensorBatches(torch.zeros(2, 3, 8, 8), None, 2, PREPARATION)
    with pytest.raises(DataError, match="one per image"):
        TensorBatches(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), 2, PREPARATION)
