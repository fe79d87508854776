"""Going on from a checkpoint: which one, whether it is sound, and whether it belongs to what is trained now."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from gkd.common.redact import redact_command
from gkd.training import checkpoint_files as files
from gkd.training import output_folder
from gkd.training.belongs import ESSENTIAL, check_ranks_agree, differences, facts_of, in_words, meetings_of
from gkd.training.checkpoint_faults import ONLY_A_MODEL
from gkd.training.safe_pickles import check_pickles

logger = logging.getLogger(__name__)

_STATEFUL = ("reduce_lr_on_plateau", "greedy", "SchedulerType.REDUCE_ON_PLATEAU", "SchedulerType.GREEDY")
_NOT_KEPT = ("params", "lr")  # of an optimizer's group: everything else is a setting


class GoingOnMixin:
    """What happens before the first step of a training, resumed or not."""

    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    is_world_process_zero: Any
    run_id: str | None = None  # what the checkpoints of this run carry
    _number_before = 0  # of the checkpoint that was gone on from
    _facts: Mapping[str, Any] | None = None
    _kind_of_optimizer: str | None = None
    _asked_for: Sequence[dict[str, Any]] = ()  # by the settings, of the optimizer's groups
    commands: list[dict[str, Any]]  # how the run was started, and gone on with: step, and redacted command

    @property
    def kind_of_optimizer(self) -> str:
        """Of the one that was passed, else the name in the settings."""
        if self._kind_of_optimizer is None:
            name = self.args.optim
            given = self.optimizer
            self._kind_of_optimizer = str(getattr(name, "value", name)) if given is None else type(given).__name__
        return self._kind_of_optimizer

    # ------------------------------------------------------------------------------------- together with all ranks

    def _first_rank(self, act: Callable[[], Any]) -> Any:
        """What `act()` gives on the first rank, everywhere; where it fails there, all ranks end. A collective."""
        result: list[Any] = [None, None]
        error: Exception | None = None
        if self.accelerator.process_index == 0:
            try:
                result[0] = act()
            except (ValueError, OSError) as found:
                error, result[1] = found, str(found)
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(result)
        if result[1] is not None:
            raise error or ValueError(result[1])
        return result[0]

    def _all_ranks(self, act: Callable[[], None]) -> None:
        """Do it on every rank; a ValueError of any of them is raised on all. A collective."""
        error = None
        try:
            act()
        except ValueError as found:
            error = found
        if self.accelerator.num_processes > 1:
            everybody: list[Any] = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(everybody, None if error is None else str(error))
            error = error or next((ValueError(text) for text in everybody if text is not None), None)
        if error is not None:
            raise error

    def _check_folder_is_shared(self) -> None:
        """Every rank must see what the first one writes, or nothing could be gone on from.

        Raises:
            ValueError: one does not.
        """
        if self.accelerator.num_processes == 1 or self.args.save_on_each_node:
            return
        folder, path = self.args.output_dir, None
        token = self._first_rank(output_folder.new_run)
        try:
            path = self._first_rank(lambda: str(output_folder.mark(folder, token)))

            def look() -> None:
                if not output_folder.sees(folder, token):
                    raise ValueError(
                        f"rank {self.accelerator.process_index} does not see what rank 0 writes into output_dir="
                        f"{folder!r}: it must be shared by all machines, under the same path"
                    )

            self._all_ranks(look)
        finally:
            if path is not None and self.accelerator.process_index == 0:
                os.unlink(path)

    # --------------------------------------------------------------------------------------------- which checkpoint

    def asked_checkpoint(self) -> str | bool | None:
        """What the field `resume_from_checkpoint` asks `train` for: a folder, or True for the one in output_dir that
        was saved last; None where there is none yet, so that the same command starts a run and goes on with it.

        Raises:
            ValueError: nothing that is there can be gone on from, though a model was saved.
        """
        wanted, folder = self.args.resume_from_checkpoint, self.args.output_dir
        if wanted is None or str(wanted).lower() in ("false", "none"):
            return None
        if str(wanted).lower() != "true":
            return str(wanted)

        def there_is_one() -> bool:
            if files.newest(folder)[0] is not None:
                return True
            alone = no_way_on(folder)
            if alone:
                raise ValueError(f"resume_from_checkpoint=true: {folder} holds no complete checkpoint{alone}")
            files.find(folder)  # tells of what was cut off
            logger.warning("resume_from_checkpoint=true: %s holds no complete checkpoint, starting anew", folder)
            return False

        return True if self._first_rank(there_is_one) else None

    def _resolve(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to go on from: whole, and all of it data.

        Raises:
            ValueError: there is none, or it cannot be gone on from.
        """
        if not wanted:
            return None
        checkpoint: str = self._first_rank(lambda: self._find(wanted))

        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes

        def check() -> None:
            if not os.path.isfile(os.path.join(checkpoint, files.TRAINER_STATE)):
                raise ValueError(
                    f"resume_from_checkpoint={wanted}: rank {rank} does not see {checkpoint}, and output_dir="
                    f"{self.args.output_dir!r} must be shared by all machines"
                )
            check_pickles(checkpoint, rank, ranks)

        self._all_ranks(check)
        return checkpoint

    def _find(self, wanted: str | bool) -> str:
        if not isinstance(wanted, bool):
            if not os.path.isdir(wanted):
                raise ValueError(f"resume_from_checkpoint={str(wanted)!r}: there is no such folder")
            fault = files.fault_in_going_on(wanted, contents=True)
            if fault is None:
                return str(wanted)
            remedy = "pass another, or true for the complete one saved last"
            if fault == ONLY_A_MODEL:
                remedy = "start anew from its weights (model_name_or_path), or pass a checkpoint with both"
            raise ValueError(f"resume_from_checkpoint={str(wanted)!r} is not complete ({fault}): {remedy}")
        checkpoint = files.find(self.args.output_dir, contents=True)
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=True: {self.args.output_dir} holds no complete checkpoint"
                f"{no_way_on(self.args.output_dir)}"
            )
        return checkpoint

    # ------------------------------------------------------------------------------------------ what it belongs to

    def _check_belongs(self, checkpoint: str | None) -> None:
        """Compare this training with the other ranks', and with the one that the checkpoint is of.

        Raises:
            ValueError: ranks differ; or the checkpoint's state means nothing for what is trained now.
        """
        self._facts = facts_of(self)
        check_ranks_agree(self.accelerator, {**self._facts, **meetings_of(self.args)})
        state = None if checkpoint is None else files.read_state(checkpoint)
        if state is None or "belongs" not in state:
            return
        found = differences(state["belongs"], self._facts)
        essential = {name: pair for name, pair in found.items() if name in ESSENTIAL}
        if essential:
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} is of another training ({in_words(essential)}), whose "
                "optimizer's state means nothing here: go on with what it was saved with, or start from its weights"
            )
        if found and self.is_world_process_zero():
            # A schedule that is no function of the step has its rates in its state.
            keeps = str(self.args.lr_scheduler_type) in _STATEFUL and "learning_rate" in found
            logger.warning(
                "going on from %s with something else than it was saved with: %s.%s What follows is not what the run "
                "would have been",
                checkpoint,
                in_words(found),
                " The new learning_rate does not hold: the schedule's state has its own." if keeps else "",
            )

    def _choose_run(self, checkpoint: str | None) -> None:
        """Whose checkpoints the ones that follow are: those of the run that is gone on with, or of a new one.

        Raises:
            ValueError: the output folder holds checkpoints of another run.
        """
        folder, overwrite = self.args.output_dir, self.args.overwrite_output_dir
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

        self.run_id, self._number_before = self._first_rank(choose)
        if checkpoint is None:
            self.commands = []
        step = 0 if checkpoint is None else files.step_of(checkpoint)
        command = redact_command(sys.argv)
        if not self.commands or self.commands[-1] != {"step": step, "command": command}:
            self.commands = [*self.commands, {"step": step, "command": command}]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; remembers what the settings ask for, before a checkpoint is loaded."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        self._asked_for = [
            {"initial_lr": group["lr"], **{name: value for name, value in group.items() if name not in _NOT_KEPT}}
            for group in getattr(optimizer, "param_groups", ())
        ]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `transformers.Trainer`, whose optimizer then has the checkpoint's settings: those asked for hold
        instead, which are the same unless they were changed."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
        if checkpoint is None or len(groups) != len(self._asked_for) or not isinstance(scheduler, LambdaLR):
            return
        for group, settings in zip(groups, self._asked_for, strict=True):
            group.update(settings)
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        scales = [scale(scheduler.last_epoch) for scale in scheduler.lr_lambdas]
        for group, base, scale in zip(groups, scheduler.base_lrs, scales, strict=True):
            group["lr"] = base * scale
        scheduler._last_lr = [group["lr"] for group in groups]

    def _load_best_model(self) -> None:
        """As in `transformers.Trainer`; the folder's name comes from a file, so what it holds is looked at first."""
        best = self.state.best_model_checkpoint
        if best is not None and os.path.isdir(best):
            self._all_ranks(
                lambda: check_pickles(best, self.accelerator.process_index, self.accelerator.num_processes)
            )
        super()._load_best_model()  # type: ignore[misc]


def no_way_on(output_dir: str) -> str:
    """Words on checkpoints that are there, but hold a model alone; nothing without any."""
    alone = [path for path in files.checkpoints(output_dir) if files.fault_in_going_on(path) == ONLY_A_MODEL]
    if not alone:
        return ""
    return (
        f"; {alone[-1].name} holds weights alone (save_only_model): start anew from them with model_name_or_path and "
        "another output_dir"
    )
