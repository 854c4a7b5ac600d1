"""Writing a file so that it is either whole or not there: a temporary file beside it, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from tersenet.errors import TersenetError

_NOT_WRITABLE = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT,
)  # fmt: skip


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path to write to, which becomes `path` when the block ends without an error.

    The temporary name keeps the suffix, because many writers choose the format by it.

    Raises:
        TersenetError: when the disk is full or the folder cannot be written; nothing half-written stays behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TersenetError(
                f"the disk is full: {path} could not be written; free some space and call again to go on"
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise TersenetError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
