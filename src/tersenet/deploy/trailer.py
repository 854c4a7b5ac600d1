"""What a file says about its inputs where its format has no place for it: JSON behind the file's own bytes.

Both .tflite and .pte begin with a FlatBuffer, which is read from its front by offsets, so that what follows is free.
"""

from __future__ import annotations

import json
from pathlib import Path

from tersenet.task import Preparation

_HEADING = b"\ntersenet.metadata="


def with_trailer(content: bytes, preparation: Preparation | None) -> bytes:
    """The file with its preparation behind it."""
    return content if preparation is None else content + _HEADING + json.dumps(preparation.metadata()).encode()


def read_trailer(path: Path) -> dict[str, str]:
    """What `with_trailer` wrote; nothing where there is none, or none that can be read."""
    _, found, said = path.read_bytes().rpartition(_HEADING)
    if not found:
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads(said).items()}
    except (ValueError, AttributeError):
        return {}
