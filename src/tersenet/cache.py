"""Where things are kept that can be made again: decoded images, rooflines, latency tables, sensitivities."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$TERSENET_CACHE`, else `$XDG_CACHE_HOME/tersenet`, else `~/.cache/tersenet`. It need not exist."""
    own, shared = os.environ.get("TERSENET_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "tersenet"
