"""A module through `torch.compile` (Inductor), as the runtime "pytorch-compiled".

Compiling happens at the first call with a new batch and takes seconds to minutes, so it shows in the time of the first
call and not in that of loading. It needs a C++ compiler.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersenet.errors import SettingsError


def compiled(path: Path, model: Any) -> Any:
    """The module, compiled at its first call for its input's shape.

    Raises:
        SettingsError: where there is no C++ compiler.
    """
    import torch
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    config.compile_threads = 1  # else a pool of processes that outlives the compiling, on cores that others measure on
    try:
        get_cpp_compiler()
    except Exception as error:  # Inductor's own kind, which it may rename
        raise SettingsError(
            f"pytorch-compiled cannot run {path.name}: torch.compile found no C++ compiler; install one, such as g++"
        ) from error
    model.requires_grad_(False)
    return torch.compile(model, dynamic=False)
