"""The output folder belongs to one run at a time: it is locked while one works there, and what other runs left in it
is neither overwritten nor deleted unasked.

The lock is the kernel's (`fcntl.lockf`), so it ends with its process however that ends, and the workers that a run
forks do not hold it. The file says who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gkd.common.errors import DiskFullError
from gkd.training import checkpoint_files as files

logger = logging.getLogger(__name__)

LOCK_FILE = "_gkd_lock.json"  # the underscore keeps it out of what goes to the Hub
EARLIER = "_earlier"  # where results go that belong to other weights than those that take their place
_WRITTEN = {"README.md": False, "evaluation.json": False, "metrics.jsonl": False, "plots": True, EARLIER: True}
_SEEN_WITHIN_S = 30.0  # what a file server may take to show another machine a new file
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

# By real path: the open file and how often it is held. The kernel's lock ends when any handle of the process on that
# file is closed, so each process has one.
_held: dict[str, tuple[int, IO[str], int]] = {}


def make(folder: str) -> None:
    """Make the output folder, before anything is loaded.

    Raises:
        ValueError: it cannot be made or written to, or something in it stands where the run will write.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir={folder!r} cannot be made: {error.strerror}; name another folder") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output_dir={folder!r} cannot be written to: name another folder, or mend its permissions")
    for path in Path(folder).iterdir():
        is_ours = path.name in _WRITTEN or files.step_of(path) >= 0
        wants_folder = _WRITTEN.get(path.name, True)
        if is_ours and path.exists() and path.is_dir() != wants_folder:
            kind, wanted = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
            raise ValueError(
                f"output_dir={folder!r}: {path.name} is {kind}, and the run writes {wanted} of that name there: "
                "move it away, or name another folder"
            )


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Inside, no other process works in the folder; may be entered again by the same one.

    Raises:
        ValueError: another run works there; the message says which.
    """
    key = os.path.realpath(folder)
    pid, file, count = _held.get(key, (0, None, 0))
    if file is None or pid != os.getpid():  # a forked child has its parent's table, but not its locks
        file, count = _take(folder), 0
    _held[key] = (os.getpid(), file, count + 1)
    try:
        yield
    finally:
        _, file, count = _held.pop(key)
        if count > 1:
            _held[key] = (os.getpid(), file, count - 1)
        else:
            file.close()


def _take(folder: str) -> IO[str]:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, LOCK_FILE)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the run
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            logger.warning("%s: its file system knows no locks; see that no second run works there", folder)
            return file
        file.seek(0)
        holder = _holder(file.read())
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f"output_dir={folder!r} is in use by another run{holder}: wait for it, stop it, or name another folder"
            ) from None
        raise
    try:
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %z")}, file)
        file.flush()
    except OSError as error:
        file.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            errno.ENOSPC, f"the disk is full: nothing can be written. Make room in {folder}"
        ) from error
    return file


def _holder(text: str) -> str:
    try:
        about = json.loads(text)
        return f" (process {int(about['pid'])} on {str(about['host'])!r}, since {about['since']})"
    except (ValueError, KeyError, TypeError):
        return ""


def new_run() -> str:
    """A name for a run, which its checkpoints carry."""
    return uuid.uuid4().hex


def check_free(folder: str, run: str, overwrite: bool) -> None:
    """Before a training that starts anew.

    Args:
        folder: the output folder.
        run: the run that wants to train there; its own checkpoints are no obstacle.
        overwrite: the user has said that those of other runs may go.

    Raises:
        ValueError: it holds complete checkpoints of another run, which this one would mix with its own.
    """
    others = [path for path in files.checkpoints(folder) if files.run_of(path) != run]
    if overwrite:
        for path in others:
            files.discard(path)
        return
    whole = [path.name for path in others if files.fault_of(path) is None]
    if whole:
        shown = ", ".join(whole if len(whole) < 4 else [*whole[:2], "...", whole[-1]])
        raise ValueError(
            f"output_dir={folder!r} holds checkpoints of another run ({shown}): go on from the last with "
            "resume_from_checkpoint=true, name another folder, or have them deleted with overwrite_output_dir=true"
        )


def set_results_aside(folder: str) -> list[str]:
    """Evaluation and plots belong to the weights beside them: when these are about to be replaced, into a folder.

    Returns:
        The names of what was moved.
    """
    moved = []
    for name in ("evaluation.json", "plots"):
        path, place = Path(folder) / name, Path(folder) / EARLIER / name
        if path.exists():
            place.parent.mkdir(exist_ok=True)
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            elif place.exists():
                place.unlink()
            os.replace(path, place)
            moved.append(name)
    return moved


def mark(folder: str, token: str) -> Path:
    """A file whose name no machine has looked for before, so that no file server answers from memory."""
    path = Path(folder) / f"_gkd_ranks_{token}"
    path.touch()
    return path


def sees(folder: str, token: str, seconds: float = _SEEN_WITHIN_S) -> bool:
    """Whether that file is seen from here, now or soon."""
    end = time.monotonic() + seconds
    while not (found := (Path(folder) / f"_gkd_ranks_{token}").exists()) and time.monotonic() < end:
        time.sleep(0.2)
    return found
