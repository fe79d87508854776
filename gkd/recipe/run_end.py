"""The end of a run: what was trained is kept even where the output folder cannot take it, and what cannot be written
is reported when everything else has been."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gkd.common.disk import full_disk_explained
from gkd.common.errors import DiskFullError
from gkd.common.ranks import max_over_ranks
from gkd.training.output_folder import set_results_aside

logger = logging.getLogger(__name__)

_WRITING = (OSError, RuntimeError, SafetensorError)  # what writers raise; torch.save reports a full disk as the second


def save_weights(trainer: Any) -> None:
    """Save the trained weights into the output folder; where it cannot take them, beside the machine's temporary
    files. A collective: every rank calls it.

    Raises:
        DiskFullError: the output folder could not take them; the message says where they are.
    """
    folder = trainer.args.output_dir
    error = _attempt(trainer, folder, lambda: set_results_aside(folder))
    if error is None:
        return
    refuge: list[Any] = [None]
    if trainer.is_world_process_zero():
        refuge[0] = tempfile.mkdtemp(prefix=f"{Path(folder).name}-")
    if trainer.accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(refuge)
    second = _attempt(trainer, refuge[0], lambda: None)
    if second is None:
        what = f"the trained weights could not be written there and are saved in {refuge[0]}: copy them from there"
    else:
        what = (
            f"the trained weights could not be written there, and not in {refuge[0]} either ({second}): they are lost"
        )
    if trainer.state.global_step and (newest := _newest(folder)):
        what += f". The last checkpoint is {newest}"
    raise DiskFullError(getattr(error, "errno", None) or errno.ENOSPC, f"{_reason(error)}: {what}", folder) from error


def _newest(folder: str) -> str | None:
    from gkd.training.checkpoint_files import newest

    return newest(folder)[0]


def _attempt(trainer: Any, folder: str, before: Callable[[], Any]) -> Exception | None:
    """Save; the error where a rank could not, on all ranks."""
    error: Exception | None = None
    try:
        if trainer.is_world_process_zero():
            before()
        trainer.save_model(folder, _internal_call=True)  # the push comes last, when all is there
    except _WRITING as found:
        error = found
    if trainer.accelerator.num_processes > 1:
        failed = max_over_ranks(trainer.accelerator, torch.tensor([error is not None], dtype=torch.int32))
        if bool(failed[0]) and error is None:
            error = OSError(errno.EIO, "another rank could not save the weights")
    return error


def _reason(error: Exception) -> str:
    try:
        with full_disk_explained("it", tempfile.gettempdir(), ""):
            raise error
    except DiskFullError:
        return "the disk is full"
    except _WRITING:
        return f"{type(error).__name__}: {error}"


class Results:
    """Writes what a run has to say, one thing after the other; a thing that cannot be written keeps back no other.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.failed: dict[str, Exception] = {}

    def write(self, what: str, act: Callable[[str], Any]) -> Any:
        """What `act(folder)` gives; None when it could not write."""
        try:
            return act(self.folder)
        except OSError as error:
            self.failed[what] = error
            return None

    def raise_for_failures(self) -> None:
        """At the end.

        Raises:
            DiskFullError: something could not be written; the weights are where they were saved.
        """
        if self.failed:
            first = next(iter(self.failed.values()))
            raise DiskFullError(
                getattr(first, "errno", None) or errno.ENOSPC,
                f"the model is saved in {self.folder}, but {', '.join(self.failed)} could not be written "
                f"({_reason(first)}): make room and start the same command with resume_from_checkpoint=true, or "
                "measure again with gkd evaluate",
                self.folder,
            )


def write_history(trainer: Any, folder: str) -> None:
    """Every logged line, for plots of one's own. JSON has no NaN and no infinity, as a skipped step's gradient has:
    null stands for them."""
    path = Path(folder) / "metrics.jsonl"
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(_without_nan(entry)) + "\n" for entry in trainer.state.log_history)
    os.replace(temporary, path)


def _without_nan(value: Any) -> Any:
    """A logged line, or a part of it."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
