"""Batches from 8-bit images in memory, the same for the same (epoch, start) whatever ran before.

The order of an epoch is drawn from (seed, epoch) and the augmentation of a batch from (seed, epoch, batch), so training
that was cut in the middle of an epoch goes on without reading what came before. Augmentation is the usual one for small
images (He et al., arXiv:1512.03385, section 4.2: pad, crop, flip) by the library kornia.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet import augmentation
from tersenet.errors import DataError, SettingsError, require
from tersenet.task import Preparation


class TensorBatches:
    """Images and labels in memory, as normalised batches.

    A batch is (x, y), or (x,) where there are no labels: x (n, C, H, W) float32, `(pixel / 255 - mean) / std` per
    channel, and y (n,) int64. Iterating gives epoch 0; `at` gives any epoch from any batch on.

    Args:
        images: (N, C, H, W) uint8, already of the size and channels of `preparation`.
        labels: (N,) int64, or None.
        batch_size: images per batch; the last batch may be smaller.
        preparation: mean and deviation per channel.
        shuffle: another order in each epoch.
        augment: "crop_flip" pads by an eighth of the height (4 pixels for 32x32), crops at random and flips half of the
            images left to right; "crop" does not flip, for digits and letters; "crop:1" pads by 1 pixel; None leaves
            the images alone.
        seed: of order and augmentation, 0 or more.
        drop_last: leave out a last batch that is smaller than the others.
        contents: a hash of the images where one is known, so that `digest` need not read them.
    Raises:
        DataError: when there are no images, or they do not fit the labels or the preparation.
        SettingsError: for a batch size, seed or augmentation that is not allowed.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        batch_size: int,
        preparation: Preparation,
        shuffle: bool = False,
        augment: str | None = None,
        seed: int = 0,
        drop_last: bool = False,
        contents: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise SettingsError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise SettingsError(f"seed must be 0 or more, got {seed}")
        if augment is not None:
            augmentation.parse(augment)
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"images must be uint8 of shape (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}"
            )
        if len(images) == 0:
            raise DataError("there are no images (0 samples); give at least one")
        if images.shape[1] != preparation.channels:
            raise DataError(
                f"the images have {images.shape[1]} channels, but the preparation has a mean for "
                f"{preparation.channels}; give one mean and one std per channel"
            )
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != torch.int64):
            raise DataError(
                f"labels must be int64 of shape ({len(images)},), one per image, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.preparation = preparation
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.drop_last = drop_last
        self.contents = contents

    @property
    def samples(self) -> int:
        """The number of images."""
        return len(self.images)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return self.samples // self.batch_size if self.drop_last else -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self.at(0)

    def at(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch from number `start` on; the same arguments give the same bits."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
            order = torch.randperm(self.samples, generator=generator)
        else:
            order = torch.arange(self.samples)
        for number in range(start, len(self)):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            x = self._normalised(self.images[chosen], epoch, number)
            yield (x,) if self.labels is None else (x, self.labels[chosen])

    def subset(self, samples: int, seed: int) -> TensorBatches:
        """`samples` images drawn without putting back, in the order drawn; all of them, in that order, if fewer."""
        return self._chosen(self._permutation(seed)[:samples])

    def split(self, share: float, seed: int) -> tuple[TensorBatches, TensorBatches]:
        """A random `share` of the images, and the others. Raises SettingsError when a side would be empty."""
        cut = round(self.samples * share)
        if not 0 < cut < self.samples:
            raise SettingsError(f"share must leave images on both sides, got {share} of {self.samples} images")
        order = self._permutation(seed)
        return self._chosen(order[:cut]), self._chosen(order[cut:])

    def like(self, **changes: Any) -> TensorBatches:
        """The same images given out differently, such as `like(shuffle=False, augment=None)`."""
        settings = {
            "images": self.images,
            "labels": self.labels,
            "batch_size": self.batch_size,
            "preparation": self.preparation,
            "shuffle": self.shuffle,
            "augment": self.augment,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "contents": None if "images" in changes else self.contents,
        }
        return TensorBatches(**{**settings, **changes})

    def digest(self) -> str:
        """A checksum of all images and labels and of how they are given out."""
        if self.contents is None:
            self.contents = hashlib.sha256(self.images.contiguous().numpy().data).hexdigest()
        labels = b"" if self.labels is None else self.labels.contiguous().numpy().tobytes()
        settings = (self.contents, tuple(self.images.shape), self.batch_size, self.preparation, self.shuffle,
                    self.augment, self.seed, self.drop_last)  # fmt: skip
        return hashlib.sha256(repr(settings).encode() + labels).hexdigest()

    def _permutation(self, seed: int) -> Tensor:
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(_mixed(seed)))

    def _chosen(self, index: Tensor) -> TensorBatches:
        return self.like(images=self.images[index], labels=None if self.labels is None else self.labels[index])

    def _normalised(self, images: Tensor, epoch: int, number: int) -> Tensor:
        x = images.float() / 255
        if self.augment is not None:
            # Before the normalisation, so that the border is black.
            x = _augmented(x, self.augment, _mixed(self.seed, epoch, number))
        mean = torch.tensor(self.preparation.mean, dtype=torch.float32)[:, None, None]
        std = torch.tensor(self.preparation.std, dtype=torch.float32)[:, None, None]
        return (x - mean) / std


def _mixed(*numbers: int) -> int:
    """One seed from several numbers, by numpy's hash: neighbours give streams that have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _augmented(x: Tensor, augment: str, seed: int) -> Tensor:
    """Crop and flip (n, C, H, W), drawn from `seed`; torch's own random numbers are left as they were."""
    kornia = require("kornia.augmentation", "data", "augment images")
    height, width = x.shape[-2:]
    flip, pixels = augmentation.parse(augment)
    pixels = max(1, height // 8) if pixels is None else pixels
    steps = [kornia.RandomCrop((height, width), padding=pixels, cropping_mode="slice")]
    if flip:
        steps.append(kornia.RandomHorizontalFlip())
    # kornia draws from torch's default generator. `torch.manual_seed` would also seed the GPU's, which is not forked.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for step in steps:
            x = step(x)
    return x.contiguous()
