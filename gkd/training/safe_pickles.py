"""DeepSpeed unpickles what a checkpoint's folder holds, and a pickle runs any program. So every such file is first
read by torch's loader for weights, which knows tensors, plain values and the few classes named here, nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_LATEST = ("latest", "latest_universal")  # files that name the folder with DeepSpeed's states
# What DeepSpeed's own states hold beside tensors and plain values: data, none of which does anything when it is made.
_SAFE = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def check_pickles(checkpoint: str | Path, share: int = 0, of: int = 1) -> None:
    """Refuse a checkpoint whose DeepSpeed states hold anything but data.

    Args:
        checkpoint: the folder.
        share, of: look at every `of`-th file, from number `share`: ranks share the work.

    Raises:
        ValueError: a file that is something else, or a name that leads out of the folder.
    """
    folder = Path(checkpoint)
    for name in _LATEST:
        path = folder / name
        if path.is_file():
            tag = path.read_text(encoding="utf-8", errors="replace").strip()
            if Path(tag).name != tag or tag in ("", ".", ".."):
                raise ValueError(f"{path} names {tag!r}, which is no folder of this checkpoint: it is not loaded")
    found = list(_files(folder))[share::of]
    if not found:
        return
    with _safe_classes():
        for path in found:
            _check(path)


def _files(folder: Path) -> Iterator[Path]:
    """In the folders below, which DeepSpeed reads: files of pickles by their names, and everything where its states
    are, links followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        below = Path(place) != folder
        states = below and Path(place).relative_to(folder).parts[0].startswith("global_step")
        for name in sorted(names):
            path = Path(place) / name
            if below and (states or path.suffix in _SUFFIXES) and path.suffix not in (".json", ".py", ".safetensors"):
                yield path


def _check(path: Path) -> None:
    try:
        # Mapped where that can be done: then only the pickle is read, not the tensors.
        torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, AttributeError, TypeError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is damaged, and DeepSpeed would run what it finds "
            f"there: it is not loaded{f' ({reason[:200]})' if reason else ''}. Go on from a checkpoint of your own"
        ) from error


@contextlib.contextmanager
def _safe_classes() -> Iterator[None]:
    classes: list[Any] = []
    for name in _SAFE:
        module, _, attribute = name.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError):  # another version of DeepSpeed, or none
            classes.append(getattr(importlib.import_module(module), attribute))
    with torch.serialization.safe_globals(classes):
        yield
