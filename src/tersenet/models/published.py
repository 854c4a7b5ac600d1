"""How the inputs of published networks are prepared: configurations of timm, torchvision and Hugging Face.

timm keeps one for each network, torchvision one for each set of weights. A folder from the Hugging Face hub has
`preprocessor_config.json` (transformers) or `config.json` with "pretrained_cfg" (timm) beside the weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersenet.errors import DataError, InputWarning
from tersenet.task import INTERPOLATIONS, Preparation

# transformers writes Pillow's numbers.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def of_timm(config: Mapping[str, Any]) -> Preparation:
    """From timm's data configuration: {"input_size", "mean", "std", "interpolation", "crop_pct", ...}."""
    height, width = config["input_size"][1:]
    if config.get("crop_mode", "center") != "center":
        warnings.warn(
            f"timm's configuration asks for crop_mode {config['crop_mode']!r}; images are resized and their middle is "
            "cut out (crop_mode 'center') instead",
            InputWarning,
            stacklevel=2,
        )
    return Preparation(
        (height, width), tuple(config["mean"]), tuple(config["std"]),
        interpolation=_known(config.get("interpolation")), crop=_share(config.get("crop_pct")),
        source="timm's configuration",
    )  # fmt: skip


def of_torchvision(preset: Any, size: tuple[int, int], labels: Sequence[str]) -> Preparation:
    """From torchvision's preset of a set of weights, `ImageClassification(crop_size, resize_size, mean, std, ...)`.

    Args:
        size: (height, width) that the network takes.
    """
    resized = getattr(preset, "resize_size", None) or size
    interpolation = getattr(getattr(preset, "interpolation", None), "value", None)
    return Preparation(
        size, tuple(preset.mean), tuple(preset.std), tuple(labels),
        _known(interpolation), _share(min(size) / min(resized)), source="torchvision's preset",
    )  # fmt: skip


def beside(weights: Path) -> Preparation | None:
    """What a folder from the Hugging Face hub says of the weights in it; None where it says nothing.

    Raises:
        DataError: when a configuration is there and cannot be understood.
    """
    readers = {"preprocessor_config.json": _of_transformers, "config.json": _of_hub_timm}
    for name, read in readers.items():
        path = Path(str(weights).partition("#")[0]).parent / name
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # no such file, or one of something else
        if not isinstance(config, dict):
            continue
        try:
            found = read(config)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"{path} says how images are prepared in a form that is not known ({type(error).__name__}: {error}); "
                "move it away and give --mean, --std and --image-size"
            ) from error
        if found is not None:
            return found
    return None


def _of_hub_timm(config: dict[str, Any]) -> Preparation | None:
    pretrained = config.get("pretrained_cfg")
    return of_timm(pretrained) if isinstance(pretrained, dict) and "input_size" in pretrained else None


def _of_transformers(config: dict[str, Any]) -> Preparation | None:
    if "image_mean" not in config or "image_std" not in config:
        return None
    resized = config["size"]
    cropped = config.get("crop_size") if config.get("do_center_crop", True) else None
    size = _sides(cropped if cropped is not None else resized)
    crop = config.get("crop_pct") or (1.0 if cropped is None else min(size) / min(_sides(resized)))
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    if not config.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    # Values are pixel * factor, and pixel / 255 here.
    factor = 255 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
    return Preparation(
        size, tuple(value / factor for value in mean), tuple(value / factor for value in std),
        interpolation=_known(_RESAMPLE.get(config.get("resample", 2))), crop=_share(crop),
        source="its preprocessor_config.json",
    )  # fmt: skip


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of a number, {"height", "width"} or {"shortest_edge"}."""
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _share(crop: Any) -> float:
    """A network that is cropped from a smaller image than its input takes the whole of it, resized."""
    return min(float(crop), 1.0) if crop else 1.0


def _known(interpolation: Any) -> str:
    return interpolation if interpolation in INTERPOLATIONS else "bilinear"
