"""The C++ compiler that `torch.compile` needs, asked for before anything is built on it."""

from __future__ import annotations

from tersenet.errors import SettingsError


def need_compiler(what: str) -> None:
    """Raises SettingsError, beginning with `what`, where there is no C++ compiler."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    config.compile_threads = 1  # else a pool of processes that outlives the compiling, on cores that others measure on
    try:
        get_cpp_compiler()
    except Exception as error:  # Inductor's own kind, which it may rename
        raise SettingsError(f"{what}: torch.compile found no C++ compiler; install one, such as g++") from error
