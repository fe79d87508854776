"""A full disk, said so that it can be mended: what was being written, where, and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gkd.errors import DiskFullError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_ROOM = 64 * 1024  # bytes; a file system with less cannot take the next block of anything that is saved here


@contextmanager
def full_disk_explained(what: str, path: str | Path, remedy: str) -> Iterator[None]:
    """Turn the errors by which writers report a full disk into one that says what to do.

    Args:
        what: is being written.
        path: where to; need not exist.
        remedy: what the user can do.

    Raises:
        DiskFullError: the disk was full. Any other error passes as it is.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports it as a RuntimeError
        if isinstance(error, DiskFullError) or not _is_full(error, Path(path)):
            raise
        raise DiskFullError(
            errno.ENOSPC, f"the disk is full: {what} could not be written. {remedy}", str(path)
        ) from error


def _is_full(error: Exception, path: Path) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_SPACE
    if os.strerror(errno.ENOSPC) in str(error):
        return True
    existing = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
    return shutil.disk_usage(existing).free < _ROOM
