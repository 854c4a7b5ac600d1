"""Labels for images, from any of our files in its runtime."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersenet.data.pixels import frames_of, pixels
from tersenet.deploy.runtimes import open_file
from tersenet.deploy.stand_in import StandIn
from tersenet.errors import DataError, InputWarning, ModelError, require
from tersenet.preparations import AS_SAID, Preparing, preparation_of
from tersenet.task import scored_output


def predict_images(
    file: Path, images: Sequence[Path], runtime: str | None = None, top: int = 3, preparing: Preparing = AS_SAID
) -> dict[str, list[dict[str, Any]]]:
    """The most likely labels per image: {image: [{"label", "index", "probability"}, ...]}.

    The file says how its inputs are prepared, and carries its labels; without labels the index is given.

    Args:
        preparing: how images become inputs, in place of what the file says; files of other makers say nothing.

    Raises:
        DataError: when an image is missing or cannot be read.
        ModelError: when the file has several outputs and none is clearly that of class scores, or gives NaN.
    """
    runner = open_file(file, runtime)
    preparation = preparation_of(runner, preparing)
    mean = np.asarray(preparation.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(preparation.std, dtype=np.float32)[:, None, None]
    model, found = StandIn(runner), {}
    for path in images:
        image = _image(path)
        try:
            scaled = pixels(image, preparation).astype(np.float32) / 255  # (C, H, W)
        except ValueError as error:  # more than 8 bits, and of no known range
            raise DataError(f"{path} cannot be read: {str(error).replace('its set', 'it')}") from error
        outputs = model(torch.from_numpy(((scaled - mean) / std)[None]))
        scores = outputs if isinstance(outputs, torch.Tensor) else scored_output(outputs)[1]
        logits = scores[0].double().numpy()
        if np.isnan(logits).any():
            raise ModelError(f"{file} gives NaN for {path}; check the model that it was made from")
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        order = np.argsort(-shares, kind="stable")[:top]
        found[str(path)] = [
            {
                "label": preparation.labels[index] if index < len(preparation.labels) else str(index),
                "index": int(index),
                "probability": float(shares[index]),
            }
            for index in order
        ]
    return found


def _image(path: Path) -> Any:
    """An image file, read whole."""
    pillow = require("PIL.Image", "data", "read images")
    try:
        image = pillow.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        why = "there is no such file" if not path.exists() else f"it is no image that can be read ({error})"
        raise DataError(f"{path} cannot be read: {why}; give a PNG, JPEG or WebP image") from error
    if (frames := frames_of(image)) > 1:
        warnings.warn(f"{path} has {frames} frames or pages, of which the first is read", InputWarning, stacklevel=3)
    return image
