"""Checkpoint folders on disk: which are complete, which is the newest, which go.

A checkpoint is many files, written one after the other, so a run that is killed while it saves leaves a folder that
looks like one. `gkd_state.json` tells them apart. It is the first file of a save, saying that it is not complete, and
the last, replaced in one piece once all others are on the disk, with their names and sizes. A folder without it was
written by something else (TRL, transformers): its files are looked at instead.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

STATE_FILE = "gkd_state.json"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "global_step*")


def step_of(folder: str | Path) -> int:
    """The optimizer step in a checkpoint folder's name; -1 for another name."""
    match = _NAME.match(Path(folder).name)
    return int(match[1]) if match else -1


def begin(folder: str | Path) -> None:
    """Start a save: an empty folder that says it is not complete. What an earlier save left there is removed."""
    discard(folder)
    Path(folder).mkdir(parents=True)
    _write(Path(folder) / STATE_FILE, {"complete": False})


def finish(folder: str | Path, state: dict[str, Any]) -> None:
    """End a save: bring every file to the disk, then say in one piece that the folder is complete.

    Args:
        folder: all ranks have written their files into it.
        state: what to keep in `gkd_state.json` beside that.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _to_disk(path)
        if path.name != STATE_FILE and path.suffix != ".md":  # people write into a README
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _to_disk(path)
    _write(folder / STATE_FILE, {"complete": True, "saved": time.time(), **state, "files": files})
    _to_disk(folder.parent)


def read_state(folder: str | Path) -> dict[str, Any] | None:
    """What `gkd_state.json` holds; None without the file.

    Raises:
        ValueError: it is not JSON.
    """
    path = Path(folder) / STATE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def fault_of(folder: str | Path) -> str | None:
    """Why a checkpoint cannot be resumed from, in words; None when it is complete."""
    folder = Path(folder)
    try:
        state = read_state(folder)
    except ValueError:
        return f"its {STATE_FILE} cannot be read"
    if state is None or "complete" not in state:
        return _fault_of_foreign(folder)
    if not state["complete"]:
        return "its save was cut off"
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} of {size} bytes"
    return None


def _fault_of_foreign(folder: Path) -> str | None:
    """The Trainer writes its state last; before it, every file has to be whole in itself."""
    try:
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        if not isinstance(state["global_step"], int):
            return f"its {TRAINER_STATE} names no step"
    except FileNotFoundError:
        return f"its {TRAINER_STATE} is missing"
    except (ValueError, KeyError, TypeError):
        return f"its {TRAINER_STATE} cannot be read"
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        return "it holds no weights"
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError:
                return f"its {path.name} is cut off"
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"its {path.name} is cut off"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders below `output_dir`, complete or not, in the order of their steps."""
    if not os.path.isdir(output_dir):
        return []
    found = [path for path in Path(output_dir).iterdir() if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def newest(output_dir: str | Path) -> tuple[str | None, dict[str, str]]:
    """The complete checkpoint that was saved last, and what is wrong with every other that is not complete.

    Last in time, not by number: after a run that was started anew, or went on from an older checkpoint, the higher
    number belongs to a run that is no more.
    """
    faults, complete = {}, []
    for path in checkpoints(output_dir):
        fault = fault_of(path)
        if fault is None:
            complete.append(path)
        else:
            faults[str(path)] = fault
    return (str(max(complete, key=_age)) if complete else None), faults


def find(output_dir: str | Path) -> str | None:
    """The complete checkpoint that was saved last; every one that is not complete is warned of. None without any."""
    path, faults = newest(output_dir)
    for folder, fault in faults.items():
        logger.warning("%s is left out: %s", folder, fault)
    if path is not None and read_state(path) is None:
        logger.warning("%s was not saved by gkd: its files look whole, and its ledger starts at zero", path)
    return path


def rotate(output_dir: str | Path, limit: int | None, keep: list[str | None]) -> None:
    """Delete the oldest checkpoints until `limit` complete ones are left, and those that were cut off before them.

    Args:
        output_dir: holds the checkpoints.
        limit: `save_total_limit`; None or 0 deletes nothing.
        keep: never deleted: the one just saved, and the best.
    """
    if not limit or limit < 0:
        return
    kept = {os.path.realpath(path) for path in keep if path is not None}
    complete = sorted((p for p in checkpoints(output_dir) if fault_of(p) is None), key=_age)
    for path in complete[: max(0, len(complete) - limit)]:
        if os.path.realpath(path) not in kept:
            discard(path)
    remaining = [path for path in complete if path.is_dir()]
    for path in checkpoints(output_dir):
        if remaining and path not in remaining and fault_of(path) is not None and os.path.realpath(path) not in kept:
            discard(path)


def discard(folder: str | Path) -> None:
    """Delete a checkpoint; first that it is complete, so that half of it is never taken for one."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError):  # a full disk must not keep it from being deleted
        _write(folder / STATE_FILE, {"complete": False})
    shutil.rmtree(folder, ignore_errors=True)


def _age(folder: Path) -> tuple[float, int]:
    """When it was saved (as it says itself, which survives copying), and its step."""
    state = read_state(folder) or {}
    saved = state.get("saved")
    return (saved if saved is not None else (folder / TRAINER_STATE).stat().st_mtime), step_of(folder)


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
