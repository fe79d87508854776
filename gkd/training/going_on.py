"""Going on from a checkpoint: which one, whether it is sound, and whether it belongs to what is trained now."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from accelerate import Accelerator

from gkd.common.redact import redact_command
from gkd.training import checkpoint_files as files
from gkd.training import output_folder
from gkd.training.belongs import ESSENTIAL, check_ranks_agree, differences, facts_of, in_words, meetings_of
from gkd.training.checkpoint_faults import ONLY_A_MODEL
from gkd.training.safe_pickles import check_pickles

logger = logging.getLogger(__name__)

_STATEFUL = ("reduce_lr_on_plateau", "greedy", "SchedulerType.REDUCE_ON_PLATEAU", "SchedulerType.GREEDY")


def first_rank(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """What `act()` gives on the first rank, everywhere; where it fails there, all ranks end. A collective."""
    result: list[Any] = [None, None]
    error: Exception | None = None
    if accelerator.process_index == 0:
        try:
            result[0] = act()
        except (ValueError, OSError) as found:
            error, result[1] = found, str(found)
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(result)
    if result[1] is not None:
        raise error or ValueError(result[1])
    return result[0]


def all_ranks(accelerator: Accelerator, act: Callable[[], None]) -> None:
    """Do it on every rank; a ValueError of any of them is raised on all. A collective."""
    error = None
    try:
        act()
    except ValueError as found:
        error = found
    if accelerator.num_processes > 1:
        everybody: list[Any] = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(everybody, None if error is None else str(error))
        error = error or next((ValueError(text) for text in everybody if text is not None), None)
    if error is not None:
        raise error


class GoingOn:
    """What happens before the first step of a training, resumed or not.

    Args:
        trainer: what is trained.

    Attributes:
        run_id: what the checkpoints of this run carry.
        number_before: of the checkpoint that was gone on from.
        facts: what this training belongs to.
        commands: how the run was started, and gone on with: step, and redacted command.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._args, self._accelerator = trainer, trainer.args, trainer.accelerator
        self.run_id: str | None = None
        self.number_before = 0
        self.facts: Mapping[str, Any] | None = None
        self.commands: list[dict[str, Any]] = []

    def check_folder_is_shared(self) -> None:
        """Every rank must see what the first one writes, or nothing could be gone on from.

        Raises:
            ValueError: one does not.
        """
        if self._accelerator.num_processes == 1 or self._args.save_on_each_node:
            return
        folder, path = self._args.output_dir, None
        token = first_rank(self._accelerator, output_folder.new_run)
        try:
            path = first_rank(self._accelerator, lambda: str(output_folder.mark(folder, token)))

            def look() -> None:
                if not output_folder.sees(folder, token):
                    raise ValueError(
                        f"rank {self._accelerator.process_index} does not see what rank 0 writes into output_dir="
                        f"{folder!r}: it must be shared by all machines, under the same path"
                    )

            all_ranks(self._accelerator, look)
        finally:
            if path is not None and self._accelerator.process_index == 0:
                os.unlink(path)

    # --------------------------------------------------------------------------------------------- which checkpoint

    def asked(self) -> str | bool | None:
        """What the field `resume_from_checkpoint` asks `train` for: a folder, or True for the one in output_dir that
        was saved last; None where there is none yet, so that the same command starts a run and goes on with it.

        Raises:
            ValueError: nothing that is there can be gone on from, though a model was saved.
        """
        wanted, folder = checkpoint_asked(self._args), self._args.output_dir
        if wanted is not True:
            return wanted

        def there_is_one() -> bool:
            if files.newest(folder)[0] is not None:
                return True
            alone = no_way_on(folder)
            if alone:
                raise ValueError(f"resume_from_checkpoint=true: {folder} holds no complete checkpoint{alone}")
            files.find(folder)  # warns of what was cut off
            logger.warning("resume_from_checkpoint=true: %s holds no complete checkpoint, starting anew", folder)
            return False

        return True if first_rank(self._accelerator, there_is_one) else None

    def find(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to go on from: whole, and all of it data.

        Raises:
            ValueError: there is none, or it cannot be gone on from.
        """
        if not wanted:
            return None
        checkpoint: str = first_rank(self._accelerator, lambda: self._complete(wanted))

        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes

        def check() -> None:
            if not os.path.isfile(os.path.join(checkpoint, files.TRAINER_STATE)):
                raise ValueError(
                    f"resume_from_checkpoint={wanted}: rank {rank} does not see {checkpoint}, and output_dir="
                    f"{self._args.output_dir!r} must be shared by all machines"
                )
            check_pickles(checkpoint, rank, ranks)

        all_ranks(self._accelerator, check)
        return checkpoint

    def _complete(self, wanted: str | bool) -> str:
        if not isinstance(wanted, bool):
            check_folder(wanted)
            fault = files.fault_in_going_on(wanted, contents=True)
            if fault is None:
                return str(wanted)
            remedy = "pass another, or true for the complete one saved last"
            if fault == ONLY_A_MODEL:
                remedy = "start anew from its weights (model_name_or_path), or pass a checkpoint with both"
            raise ValueError(f"resume_from_checkpoint={str(wanted)!r} is not complete ({fault}): {remedy}")
        checkpoint = files.find(self._args.output_dir, contents=True)
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=True: {self._args.output_dir} holds no complete checkpoint"
                f"{no_way_on(self._args.output_dir)}"
            )
        return checkpoint

    # ------------------------------------------------------------------------------------------ what it belongs to

    def check_belongs(self, checkpoint: str | None) -> None:
        """Compare this training with the other ranks', and with the one that the checkpoint is of.

        Raises:
            ValueError: ranks differ; or the checkpoint's state means nothing for what is trained now.
        """
        self.facts = facts_of(self._trainer)
        check_ranks_agree(self._accelerator, {**self.facts, **meetings_of(self._args)})
        state = None if checkpoint is None else files.read_state(checkpoint)
        if state is None or "belongs" not in state:
            return
        found = differences(state["belongs"], self.facts)
        essential = {name: pair for name, pair in found.items() if name in ESSENTIAL}
        if essential:
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} is of another training ({in_words(essential)}), whose "
                "optimizer's state means nothing here: go on with what it was saved with, or start from its weights"
            )
        if found and self._trainer.is_world_process_zero():
            # A schedule that is no function of the step has its rates in its state.
            keeps = str(self._args.lr_scheduler_type) in _STATEFUL and "learning_rate" in found
            logger.warning(
                "going on from %s with something else than it was saved with: %s.%s What follows is not what the run "
                "would have been",
                checkpoint,
                in_words(found),
                " The new learning_rate does not hold: the schedule's state has its own." if keeps else "",
            )

    def choose_run(self, checkpoint: str | None) -> None:
        """Whose checkpoints the ones that follow are: those of the run that is gone on with, or of a new one.

        Raises:
            ValueError: the output folder holds checkpoints of another run.
        """
        folder, overwrite = self._args.output_dir, self._args.overwrite_output_dir
        if checkpoint is not None and overwrite:
            raise ValueError(
                f"overwrite_output_dir=True would delete what resume_from_checkpoint goes on from ({checkpoint}): "
                "leave one of them out"
            )

        def choose() -> tuple[str, int]:
            run = self.run_id or output_folder.new_run()
            if checkpoint is None:
                output_folder.check_free(folder, run, overwrite)
                return run, 0
            run = files.run_of(checkpoint) or run
            if os.path.realpath(os.path.dirname(os.path.abspath(checkpoint))) != os.path.realpath(folder):
                output_folder.check_free(folder, run, overwrite)
            return run, files.number_of(checkpoint)

        self.run_id, self.number_before = first_rank(self._accelerator, choose)
        if checkpoint is None:
            self.commands = []
        step = 0 if checkpoint is None else files.step_of(checkpoint)
        command = redact_command(sys.argv)
        if not self.commands or self.commands[-1] != {"step": step, "command": command}:
            self.commands = [*self.commands, {"step": step, "command": command}]

    def check_best_model(self) -> None:
        """Before the best model is loaded. Its folder's name comes from a file, so what it holds is looked at."""
        best, accelerator = self._trainer.state.best_model_checkpoint, self._accelerator
        if best is not None and os.path.isdir(best):
            all_ranks(accelerator, lambda: check_pickles(best, accelerator.process_index, accelerator.num_processes))


def checkpoint_asked(args: Any) -> str | Literal[True] | None:
    """The field `resume_from_checkpoint` as it is meant: a folder, True for the newest in output_dir, else None."""
    wanted = str(args.resume_from_checkpoint)
    if wanted.lower() in ("false", "none"):
        return None
    return True if wanted.lower() == "true" else wanted


def check_folder(checkpoint: str) -> None:
    """Refuse a checkpoint that is not there.

    Raises:
        ValueError: there is no such folder.
    """
    if not os.path.isdir(checkpoint):
        raise ValueError(f"resume_from_checkpoint={str(checkpoint)!r}: there is no such folder")


def no_way_on(output_dir: str) -> str:
    """Words on checkpoints that are there, but hold a model alone; nothing without any."""
    alone = [path for path in files.checkpoints(output_dir) if files.fault_in_going_on(path) == ONLY_A_MODEL]
    if not alone:
        return ""
    return (
        f"; {alone[-1].name} holds weights alone (save_only_model): start anew from them with model_name_or_path and "
        "another output_dir"
    )
