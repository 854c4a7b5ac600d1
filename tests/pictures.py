"""Small pictures and tables that several tests of data write."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def plain(colour: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (8, 8), colour)


def encoded(colour: Any, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    plain(colour).save(stream, form)
    return stream.getvalue()


def class_folders(root: Path, colours: Mapping[str, Any], count: int = 2, ending: str = "png") -> None:
    """root/CLASS/NUMBER.png, all of a class in its color."""
    for name, colour in colours.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            plain(colour).save(root / name / f"{number}.{ending}")


def write_table(path: Path, columns: Mapping[str, list], **kinds: Any) -> None:
    """A parquet file of these columns; `kinds` are features of `datasets` for some of them."""
    import datasets

    made = datasets.Dataset.from_dict(dict(columns))
    if kinds:
        made = made.cast(datasets.Features({**made.features, **kinds}))
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    made.to_parquet(str(path))


def cells(*colours: Any) -> list[dict[str, Any]]:
    return [{"bytes": encoded(colour), "path": None} for colour in colours]
