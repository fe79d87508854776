"""Files that are whole or not there, and the error of a full disk: what, where, what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gkd.common.errors import DiskFullError

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


def write_whole(path: Path, content: bytes, what: str, remedy: str) -> None:
    """Write a small file that is whole or not there; `what` and `remedy` as in `full_disk_explained`."""
    with replacing(path, what, remedy) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path, what: str, remedy: str) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` at the end, or vanishes."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where a file should be: remove it")
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with full_disk_explained(what, path, remedy):
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors makes files that nobody else may read
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
