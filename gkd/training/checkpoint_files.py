"""Checkpoint folders on disk: which are complete, which is the newest, which go.

A checkpoint is many files, written one after the other, so a run that is killed while it saves leaves a folder that
looks like one. `gkd_state.json` tells them apart. It is the first file of a save, saying that it is not complete, and
the last, replaced in one piece once all others are on the disk, with their names, sizes and checksums. It also says
which run the checkpoint is of, and its number: one above every other in the folder, so that the newest is known
whatever a clock says. `gkd.training.checkpoint_faults` tells whether a folder is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from gkd.training.checkpoint_faults import (
    STATE_FILE,
    TRAINER_STATE,
    checksum,
    fault_in_going_on,
    fault_of,
    read_state,
    seal,
)

__all__ = [
    "STATE_FILE",
    "TRAINER_STATE",
    "amend",
    "begin",
    "checkpoints",
    "discard",
    "fault_in_going_on",
    "fault_of",
    "find",
    "finish",
    "newest",
    "read_state",
    "rotate",
    "run_of",
    "step_of",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^checkpoint-(\d+)$")


def step_of(folder: str | Path) -> int:
    """The optimizer step in a checkpoint folder's name; -1 for another name."""
    match = _NAME.match(Path(folder).name)
    return int(match[1]) if match else -1


def begin(folder: str | Path, run: str | None = None) -> None:
    """Start a save: an empty folder that says it is not complete. What an earlier save left there is removed.

    Args:
        folder: the checkpoint.
        run: which run saves it.
    """
    discard(folder)
    Path(folder).mkdir(parents=True)
    _write(Path(folder) / STATE_FILE, {"complete": False, **({} if run is None else {"run": run})})


def finish(folder: str | Path, state: dict[str, Any], run: str | None = None, above: int = 0) -> int:
    """End a save: bring every file to the disk, then say in one piece that the folder is complete.

    Args:
        folder: all ranks have written their files into it.
        state: what to keep in `gkd_state.json` beside that.
        run: which run has saved it.
        above: the number of the checkpoint that the run went on from.

    Returns:
        The checkpoint's number.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _to_disk(path)
        if path.name != STATE_FILE and path.suffix != ".md":  # people write into a README
            files[path.relative_to(folder).as_posix()] = [path.stat().st_size, checksum(path)]
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _to_disk(path)
    number = 1 + max([above, *(number_of(other) for other in checkpoints(folder.parent))])
    manifest = {"complete": True, "saved": time.time(), "number": number, **state, "files": files}
    manifest = json.loads(json.dumps(manifest | ({} if run is None else {"run": run})))
    _write(folder / STATE_FILE, {**manifest, "seal": seal(manifest)})
    _to_disk(folder.parent)
    return number


def amend(folder: str | Path, state: dict[str, Any]) -> None:
    """Change what is kept in a complete checkpoint, in one piece; it is then the one that was saved last."""
    number = 1 + max(number_of(other) for other in checkpoints(Path(folder).parent))
    manifest = {name: value for name, value in (read_state(folder) or {}).items() if name != "seal"}
    manifest = json.loads(json.dumps({**manifest, **state, "number": number}))
    _write(Path(folder) / STATE_FILE, {**manifest, "seal": seal(manifest)})


def number_of(folder: str | Path) -> int:
    """A checkpoint's number in the order of saves; 0 for one that something else wrote, or that cannot be read."""
    return int((_state_or_nothing(folder)).get("number", 0))


def run_of(folder: str | Path) -> str | None:
    """Which run has saved a checkpoint; None where it does not say."""
    return _state_or_nothing(folder).get("run")


def _state_or_nothing(folder: str | Path) -> dict[str, Any]:
    try:
        return read_state(folder) or {}
    except ValueError:
        return {}


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders below `output_dir`, complete or not, in the order of their steps."""
    if not os.path.isdir(output_dir):
        return []
    found = [path for path in Path(output_dir).iterdir() if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def newest(output_dir: str | Path, *, contents: bool = False) -> tuple[str | None, dict[str, str]]:
    """The checkpoint that was saved last and can be gone on from, and what is wrong with every one that cannot.

    Last in the order of saves, not by step: after a run that was started anew, or went on from an older checkpoint,
    the higher step belongs to a run that is no more.

    Args:
        output_dir: holds the checkpoints.
        contents: compare the checksums of the files, from the newest checkpoint down to one that is whole.
    """
    found = checkpoints(output_dir)
    faults = {str(path): fault for path in found if (fault := fault_in_going_on(path)) is not None}
    for path in sorted((p for p in found if str(p) not in faults), key=_age, reverse=True):
        fault = fault_in_going_on(path, contents=True) if contents else None
        if fault is None:
            return str(path), faults
        faults[str(path)] = fault
    return None, faults


def find(output_dir: str | Path, *, contents: bool = False) -> str | None:
    """As `newest`; every checkpoint that cannot be gone on from is warned of. None without any."""
    path, faults = newest(output_dir, contents=contents)
    for folder, fault in faults.items():
        logger.warning("%s is left out: %s", folder, fault)
    if path is not None and read_state(path) is None:
        logger.warning("%s was not saved by gkd: its files look whole, and its ledger starts at zero", path)
    return path


def rotate(output_dir: str | Path, limit: int | None, keep: list[str | None], run: str | None = None) -> None:
    """Delete the oldest checkpoints until `limit` complete ones are left, and those that were cut off before them.

    Args:
        output_dir: holds the checkpoints.
        limit: `save_total_limit`; None or 0 deletes nothing.
        keep: never deleted: the one just saved, and the best.
        run: whose complete checkpoints are counted and deleted; None: all.
    """
    if not limit or limit < 0:
        return
    kept = {os.path.realpath(path) for path in keep if path is not None}
    own = [path for path in checkpoints(output_dir) if run is None or run_of(path) == run]
    complete = sorted((path for path in own if fault_of(path) is None), key=_age)
    for path in complete[: max(0, len(complete) - limit)]:
        if os.path.realpath(path) not in kept:
            discard(path)
    remaining = [path for path in complete if path.is_dir()]
    for path in checkpoints(output_dir):
        worthless = _is_debris(path) or (path in own and fault_of(path) is not None)
        if remaining and path not in remaining and worthless and os.path.realpath(path) not in kept:
            discard(path)


def _is_debris(folder: Path) -> bool:
    """Whether a save or a deletion was cut off there, of whatever run."""
    state = _state_or_nothing(folder)
    return state.get("complete") is False or not any((folder / name).exists() for name in (STATE_FILE, TRAINER_STATE))


def discard(folder: str | Path) -> None:
    """Delete a checkpoint; first that it is complete, so that half of it is never taken for one. Of a link, only the
    link: what it points to is somebody else's."""
    folder = Path(folder)
    if folder.is_symlink():
        folder.unlink()
        return
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError):  # a full disk must not keep it from being deleted
        _write(folder / STATE_FILE, {"complete": False})
    shutil.rmtree(folder, ignore_errors=True)


def _age(folder: Path) -> tuple[int, float, int]:
    """Its number; the time (as it says itself, which survives copying) only where it has none; its step."""
    state = _state_or_nothing(folder)
    saved = state.get("saved")
    time_of = saved if saved is not None else (folder / TRAINER_STATE).stat().st_mtime
    return state.get("number", 0), time_of, step_of(folder)


def _write(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file in one piece."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """fsync of a file or folder; folders cannot be synced everywhere."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
