"""`open_data`: from one line of text to training, calibration, validation and test data.

Nothing is ever split off the training set on the quiet: a validation set is there when the data has one or when the
user names one, and only data that comes without a test set (digits, a folder of class folders) gets a fixed one.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersenet.data import readers, tables
from tersenet.data.batches import TensorBatches
from tersenet.data.classes import Labels, in_model_order, is_counted, listed, translated
from tersenet.data.decode import Decoded, decode, opened
from tersenet.data.pixels import pixels
from tersenet.data.readers import Found
from tersenet.errors import DataError, InputWarning, SettingsError, require
from tersenet.task import Preparation

FORMS = "digits, parquet:DIR, folder:DIR, hf:NAME, random:CxHxW"
CALIBRATION_SAMPLES = 1024
NOISE_SAMPLES = 64


@dataclass(frozen=True)
class Sources:
    """Data ready for a Task.

    Args:
        train: shuffled and augmented; None where there is none.
        calibrate: up to 1,024 training images as they are, in an order drawn from the seed.
        validate: a held-out set that came with the data or was named; None otherwise.
        test: in its own order.
        classes: the number of classes; 0 where there are no labels.
        labels: their names; the numbers as words where the data has no names.
        bad: the names of the images that were left out.
    """

    train: TensorBatches | None
    calibrate: TensorBatches | None
    validate: TensorBatches | None
    test: TensorBatches | None
    classes: int
    labels: tuple[str, ...]
    bad: tuple[str, ...] = ()


def open_data(
    spec: str,
    preparation: Preparation,
    *,
    batch_size: int = 128,
    seed: int = 0,
    columns: Sequence[str] | None = None,
    on_bad_image: str = "stop",
    limit: int | None = None,
    validate: str | None = None,
    quiet: bool = False,
) -> Sources:
    """Opens data by its name and prepares the images.

    Args:
        spec: `digits` (scikit-learn's), `parquet:DIR` (train*.parquet, test*.parquet, validation*), `folder:DIR`
            (train/, val/ and test/ with a folder per class, or only a folder per class, of which a fixed fifth is the
            test set), `hf:NAME` (downloads from the Hugging Face hub), `random:CxHxW` (64 images of noise without
            labels, for latency only).
        preparation: size, channels and normalisation of the model's inputs.
        batch_size: images per batch.
        seed: of the order, the augmentation and the choice of calibration images.
        columns: names of the image and label column of a table; found by type and name where not given.
        on_bad_image: "stop" raises at an image that cannot be read, "skip" leaves it out and warns once per set.
        limit: use at most so many images of each set, always the same ones, drawn at random.
        validate: another spec, whose test set (else all of it) is a held-out set for choosing.
        quiet: no progress bars.
    Raises:
        DataError: when the data is missing, empty, unreadable, or its labels do not fit.
        SettingsError: for a batch size, seed or limit that is not allowed.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"limit must be at least 1, got {limit}; leave it out to use everything")
    if spec.startswith("random:"):
        if validate is not None:
            raise DataError(f"{spec} has no labels, so a validation set {validate!r} has no use; leave it out")
        return _noise(spec, preparation, batch_size, seed)
    found = _found(spec, columns)
    own = in_model_order(found.labels, preparation.labels, spec) if found.labels else ()
    found = _in_one_list(found, spec, own, preparation.labels)
    decoded = _decoded(spec, found, preparation, on_bad_image, limit, quiet)
    if validate is not None:
        held = _held_out(validate, columns, found.labels)
        decoded["validate"] = _decoded(validate, held, preparation, on_bad_image, limit, quiet)["test"]
    return _sources(decoded, found.labels, preparation, batch_size, seed)


def training_sample(
    spec: str, preparation: Preparation, columns: Sequence[str] | None, count: int
) -> tuple[Iterator[tuple[Any, int]], tuple[str, ...]]:
    """(some training images as they are stored, each with its label, always the same ones; the classes' names).

    Nothing where there is no training set, or it has no labels. Images that cannot be read are left out.
    """
    if spec.startswith("random:"):
        return iter(()), ()
    found = _found(spec, columns)
    own = in_model_order(found.labels, preparation.labels, spec) if found.labels else ()
    found = _in_one_list(found, spec, own, preparation.labels)
    return _opened(found.splits["train"], count) if "train" in found.splits else iter(()), found.labels


def _opened(encoded: readers.Encoded, count: int) -> Iterator[tuple[Any, int]]:
    order = np.random.default_rng(readers.SPLIT_SEED).permutation(len(encoded.labels))[:count]
    for index in map(int, order):
        try:
            image = opened(encoded.read(index))
        except Exception:  # noqa: BLE001 - PIL's decoders raise many kinds on damaged files
            continue
        yield image, int(encoded.labels[index])


def _sources(
    decoded: dict[str, Decoded], labels: tuple[str, ...], preparation: Preparation, batch_size: int, seed: int
) -> Sources:
    """The sets by their names, in batches."""

    def batches(split: str, shuffle: bool = False, augment: str | None = None) -> TensorBatches | None:
        if split not in decoded:
            return None
        images, numbers = torch.from_numpy(decoded[split].images), torch.from_numpy(decoded[split].labels)
        return TensorBatches(
            images, numbers, batch_size, preparation, shuffle, augment, seed, contents=decoded[split].contents
        )

    plain = batches("train")
    return Sources(
        # Pictures of one channel are mostly writing, which is something else in a mirror.
        train=batches("train", shuffle=True, augment="crop" if preparation.channels == 1 else "crop_flip"),
        calibrate=None if plain is None else plain.subset(CALIBRATION_SAMPLES, seed),
        validate=batches("validate"),
        test=batches("test"),
        classes=len(labels),
        labels=labels,
        bad=tuple(name for part in decoded.values() for name in part.bad),
    )


def _found(spec: str, columns: Sequence[str] | None, split: bool = True) -> Found:
    kind, _, place = spec.partition(":")
    if spec == "digits":
        return readers.digits()
    if kind == "folder" and place:
        return readers.folder(Path(place).expanduser(), split)
    if kind == "parquet" and place:
        return tables.parquet(Path(place).expanduser(), columns)
    if kind == "hf" and place:
        return tables.hub(place, columns)
    raise DataError(f"the data {spec!r} is of no known form; write one of {FORMS}")


def _noise(spec: str, preparation: Preparation, batch_size: int, seed: int) -> Sources:
    match = re.fullmatch(r"random:(\d+)x(\d+)x(\d+)", spec)
    if match is None or not all(map(int, match.groups())):
        raise DataError(f"the data {spec!r} is of no known form; write random:CxHxW, such as random:3x224x224")
    channels, height, width = map(int, match.groups())
    if channels != preparation.channels:
        raise DataError(f"{spec} has {channels} channels, but the model takes {preparation.channels}; make them equal")
    images = torch.randint(
        0,
        256,
        (NOISE_SAMPLES, channels, height, width),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    return Sources(None, TensorBatches(images, None, batch_size, preparation, seed=seed), None, None, 0, ())


def _in_one_list(found: Found, spec: str, own: tuple[str, ...], given: tuple[str, ...]) -> Found:
    """The data with its labels counted in one list of names, after checking every label of every set.

    Args:
        own: names that the labels are counted in, where the data has names for the same classes; () where it is free.
        given: names of classes where the data has numbers only.
    """
    labels = own or found.labels
    splits = {}
    for split, encoded in found.splits.items():
        numbers = encoded.labels
        if len(numbers) == 0:
            raise DataError(f"the {split} set of {spec} is empty (0 samples); give at least one image")
        if found.labels and numbers.min() >= 0 and numbers.max() < len(found.labels):
            numbers = translated(Labels(numbers, found.labels), labels)
        allowed = len(labels or given)
        if numbers.min() < 0 or (allowed and numbers.max() >= allowed):
            top = f"there are {allowed} classes (0 to {allowed - 1})" if allowed else "labels start at 0"
            raise DataError(
                f"the labels of the {split} set of {spec} run from {numbers.min()} to {numbers.max()}, but {top}; "
                "check the label column"
            )
        splits[split] = dataclasses.replace(encoded, labels=numbers)
    if "train" in splits:
        for split, encoded in splits.items():
            new = np.setdiff1d(encoded.labels, splits["train"].labels)
            if len(new) and not labels:  # of classes with names it was said before
                warnings.warn(
                    f"the {split} set of {spec} has the label {new[0]}, which the training set has not, so nothing can "
                    "learn it",
                    InputWarning,
                    stacklevel=3,
                )
    count = max(int(encoded.labels.max()) for encoded in splits.values()) + 1
    return Found(splits, labels or given or tuple(map(str, range(count))))


def _held_out(spec: str, columns: Sequence[str] | None, labels: tuple[str, ...]) -> Found:
    """The set that `validate` names, as a test set: its own test set, else all of it."""
    found = _found(spec, columns, split=False)
    strange = [name for name in found.labels if name not in labels]
    if strange and not is_counted(found.labels):
        raise DataError(
            f"the validation set {spec} has the classes {listed(strange)}, which the data has not; it has "
            f"{listed(labels)}"
        )
    found = _in_one_list(found, spec, labels, labels)
    encoded = next(found.splits[split] for split in ("test", "validate", "train") if split in found.splits)
    return Found({"test": encoded}, labels)


def _decoded(
    spec: str, found: Found, preparation: Preparation, on_bad_image: str, limit: int | None, quiet: bool
) -> dict[str, Decoded]:
    decoded = {}
    for split, encoded in found.splits.items():
        if limit is not None and limit < len(encoded.labels):
            index = np.random.default_rng(readers.SPLIT_SEED).permutation(len(encoded.labels))[:limit]
            encoded = readers.chosen(encoded, np.sort(index))
        if spec == "digits":
            decoded[split] = _digits(encoded, preparation)
        else:
            decoded[split] = decode(encoded, preparation, f"the {split} set of {spec}", on_bad_image, quiet)
    return decoded


def _digits(encoded: readers.Encoded, preparation: Preparation) -> Decoded:
    """The digits are arrays already; only another size or colour needs an image library."""
    arrays = np.stack([encoded.read(index) for index in range(len(encoded.names))])
    if preparation.channels == 1 and preparation.size == arrays.shape[1:]:
        return Decoded(arrays[:, None], encoded.labels, ())
    pillow = require("PIL.Image", "data", "scale the digits")
    return Decoded(np.stack([pixels(pillow.fromarray(array), preparation) for array in arrays]), encoded.labels, ())
