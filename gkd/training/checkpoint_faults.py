"""What is wrong with a checkpoint folder, in words: what was cut off, damaged, or written by something else.

`gkd_state.json` holds a checkpoint's manifest: its files with their sizes and CRC-32 sums, and its own sum. A folder
without one was written by something else (TRL, transformers): its files have to be whole in themselves.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

STATE_FILE = "gkd_state.json"
TRAINER_STATE = "trainer_state.json"
ONLY_A_MODEL = "it holds weights alone, without optimizer and scheduler (save_only_model)"

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "global_step*")
# What DeepSpeed, the Trainer (also sharded) and the Trainer for a scaler of its own keep an optimizer in.
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "global_step*", "optimizer_*", "pytorch_model_fsdp*")
_CHUNK = 1 << 22
_SHAPES: dict[str, type | tuple[type, ...]] = {
    "complete": bool,
    "saved": (int, float),
    "number": int,
    "run": str,
    "ledger": dict,
    "positions": dict,
    "num_tokens": int,
    "nonfinite_steps": int,
    "empty_steps": int,
    "seconds": (int, float),
    "belongs": dict,
    "commands": list,
}


def checksum(path: Path) -> int:
    """CRC-32 of a file: finds damage, not intent."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def seal(state: dict[str, Any]) -> int:
    """CRC-32 of a manifest without its seal."""
    rest = {name: value for name, value in state.items() if name != "seal"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def read_state(folder: str | Path) -> dict[str, Any] | None:
    """What `gkd_state.json` holds; None without the file.

    Raises:
        ValueError: it is not JSON, not of the shape that `gkd.training.checkpoint_files.finish` writes, or was changed
            since.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    fault = _fault_of_shape(state)
    if fault is not None:
        raise ValueError(f"{path} cannot be read: {fault}")
    return dict(state)


def _fault_of_shape(state: Any) -> str | None:
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}"
    for name, kind in _SHAPES.items():
        value = state.get(name)
        if name in state and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            return f"its field {name!r} is a {type(value).__name__}"
    if state.get("complete"):
        if not isinstance(state.get("files"), dict) or not all(_is_entry(entry) for entry in state["files"].values()):
            return "its list of files is none"
        if any(_leaves(name) for name in state["files"]):
            return "its list names a file outside the folder"
    counts = state.get("ledger", {"sequences": {}, "targets": {}})
    if not all(isinstance(counts.get(name), dict) and _all_whole(counts[name]) for name in ("sequences", "targets")):
        return "its ledger is none"
    if "seal" in state and state["seal"] != seal(state):
        return "its checksum differs"
    return None


def _is_entry(entry: Any) -> bool:
    """Of one file: [size, CRC-32]; earlier versions wrote the size alone."""
    return _all_whole({"size": entry}) or (
        isinstance(entry, list) and len(entry) == 2 and _all_whole(dict(enumerate(entry)))
    )


def _all_whole(values: dict[Any, Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values.values())


def _leaves(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts


def fault_of(folder: str | Path, *, contents: bool = False) -> str | None:
    """Why a checkpoint is not whole, in words; None when it is.

    Args:
        folder: the checkpoint.
        contents: read every file and compare its checksum, too. Otherwise names and sizes.
    """
    folder = Path(folder)
    try:
        state = read_state(folder)
    except ValueError:
        return f"its {STATE_FILE} cannot be read"
    if state is None or "complete" not in state:
        return _fault_of_foreign(folder)
    if not state["complete"]:
        return "its save was cut off"
    for name, entry in state["files"].items():
        size, expected = entry if isinstance(entry, list) else (entry, None)
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} of {size} bytes"
        if contents and expected is not None and checksum(path) != expected:
            return f"its {name} is damaged: it is not what was saved"
    if TRAINER_STATE not in state["files"]:
        return f"its {TRAINER_STATE} is missing"
    return _fault_of_trainer_state(folder)


def fault_in_going_on(folder: str | Path, *, contents: bool = False) -> str | None:
    """Why a training cannot go on from a checkpoint: it is not whole, or holds a model and nothing else."""
    fault = fault_of(folder, contents=contents)
    if fault is None and not any(True for pattern in _OPTIMIZERS for _ in Path(folder).glob(pattern)):
        return ONLY_A_MODEL
    return fault


def _fault_of_trainer_state(folder: Path) -> str | None:
    path = folder / TRAINER_STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state["global_step"], int):
            return f"its {TRAINER_STATE} names no step"
        if not isinstance(state.get("log_history", []), list):
            return f"its {TRAINER_STATE} cannot be read"
        TrainerState.load_from_json(str(path))
    except FileNotFoundError:
        return f"its {TRAINER_STATE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        return f"its {TRAINER_STATE} cannot be read"
    step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if step is not None and int(step[1]) != state["global_step"]:
        return f"its {TRAINER_STATE} is that of step {state['global_step']}"
    return None


def _fault_of_foreign(folder: Path) -> str | None:
    """The Trainer writes its state last; before it, every file has to be whole in itself."""
    fault = _fault_of_trainer_state(folder)
    if fault is not None:
        return fault
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        return "it holds no weights"
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except (SafetensorError, OSError):
                return f"its {path.name} is cut off"
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"its {path.name} is cut off"
    return None
