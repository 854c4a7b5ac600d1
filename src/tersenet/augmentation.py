"""How settings name the way that training images are changed."""

from __future__ import annotations

import re

from tersenet.errors import SettingsError

_NAME = re.compile(r"(crop|crop_flip)(?::(\d+))?")


def parse(name: str) -> tuple[bool, int | None]:
    """(whether images are also mirrored, pixels that they are moved by at most); None: what their size suggests.

    >>> parse("crop_flip"), parse("crop:1")
    ((True, None), (False, 1))

    Raises:
        SettingsError: on another name.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise SettingsError(
            f"augment is {name!r}; allowed: none, crop, crop_flip, and crop:2 or crop_flip:2 for 2 pixels"
        )
    return found[1] == "crop_flip", None if found[2] is None else int(found[2])
