"""Saving and resuming: a killed run loses nothing that was saved, and goes on as if it had not been killed.

Sources and rollouts need no state: they are functions of (seed, step, row). Beside the Trainer's own files the record
(`gkd.training.record`) is kept, in the file that also says that the checkpoint is complete
(`gkd.training.checkpoint_files`), a teacher that changes with the student (`gkd.training.teacher_state`), and what has
been written for steps that are still to come (`gkd.training.group`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gkd.common.disk import full_disk_explained
from gkd.servers.client import ServerError
from gkd.training import checkpoint_files as files
from gkd.training import output_folder, teacher_state
from gkd.training.going_on import GoingOn, all_ranks, first_rank

logger = logging.getLogger(__name__)

_REMEDY = (
    "Earlier checkpoints are untouched: make room (save_total_limit bounds how many are kept), then go on with "
    "resume_from_checkpoint=true"
)


class Checkpoints:
    """Checkpoints that are complete or not there, under every DeepSpeed stage alike; stops by a signal.

    Args:
        trainer: what is saved, and gone on with.

    Attributes:
        going_on: from a checkpoint, or anew.
        is_saving: the Trainer is writing a checkpoint, which is not complete yet.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._args, self._accelerator = trainer, trainer.args, trainer.accelerator
        self.going_on = GoingOn(trainer)
        self.is_saving = False
        self._saved: str | None = None  # the checkpoint of the present step, once there is one
        self._started: float | None = None  # when the present training was
        self._seconds_before = 0.0  # of the run, before it
        self._ends_early = False  # by a server
        self._at_window: dict[str, Any] = {}

    # ----------------------------------------------------------------------------------------------- a training

    @contextmanager
    def around(self, wanted: str | bool | None, trial: Any) -> Iterator[str | None]:
        """A training happens inside, and goes on from the checkpoint that this gives; None: it starts anew.

        Args:
            wanted: as `train` was asked; True is the complete checkpoint in `output_dir` saved last.
            trial: of a search.

        Raises:
            ValueError, TrainingStopped, NotFiniteError, ServerError: as `GKDTrainer.train`.
        """
        guard = self._trainer.guard
        with ExitStack() as held:
            lock = output_folder.locked(self._args.output_dir)
            first_rank(self._accelerator, lambda: held.enter_context(lock))
            self.going_on.check_folder_is_shared()
            checkpoint = self.going_on.find(wanted)
            self.going_on.check_belongs(checkpoint)
            self._seconds_before, self.going_on.commands = 0.0, []
            if checkpoint is not None:
                self._load(checkpoint)
            self.going_on.choose_run(checkpoint)
            self._saved, self._started, self._ends_early = checkpoint, time.monotonic(), False
            guard.start()
            try:
                with guard.request, self._saved_when_a_server_fails(trial):
                    yield checkpoint
            finally:
                guard.is_training = False
            self._seconds_before, self._started = self.seconds, None
            guard.raise_if_stopped(self._trainer.state, self.folder(trial))

    def _load(self, checkpoint: str) -> None:
        all_ranks(self._accelerator, lambda: teacher_state.read(checkpoint, self._trainer.teacher))
        state = files.read_state(checkpoint)
        if state is not None and "ledger" in state:
            self._trainer.record.load(state)
            self._seconds_before = float(state.get("seconds", 0.0))
            self.going_on.commands = list(state.get("commands", ()))

    @property
    def seconds(self) -> float:
        """Of the whole run, over resumes, up to now."""
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    @property
    def is_training(self) -> bool:
        """Whether a training is going on."""
        return self._started is not None

    def _beside(self, name: str | None) -> str | None:
        """A checkpoint of the output folder by its name."""
        return None if name is None else os.path.join(self._args.output_dir, name)

    def that_can_be_gone_on_from(self, name: str | None) -> str | None:
        """The folder of a checkpoint of this run, where it is whole; all ranks ask."""
        folder = self._beside(name)

        def whole() -> bool:
            return folder is not None and files.fault_in_going_on(folder, contents=True) is None

        return folder if first_rank(self._accelerator, whole) else None

    def back_to(self, checkpoint: str) -> None:
        """Training goes on from an earlier checkpoint of this run: what was saved behind it is of a stretch that is
        given up, and goes; that a guard has decided so is written into it, so that a killed run goes on alike."""
        record, steering = self._trainer.record, self._trainer.record.steering

        def give_up() -> None:
            files.amend(checkpoint, {"steering": steering.as_dict()})  # from now on it is the one that was saved last
            for other in files.checkpoints(self._args.output_dir):
                if files.run_of(other) == self.going_on.run_id and files.step_of(other) > files.step_of(checkpoint):
                    files.discard(other)

        first_rank(self._accelerator, give_up)
        all_ranks(self._accelerator, lambda: teacher_state.read(checkpoint, self._trainer.teacher))
        state = files.read_state(checkpoint)
        assert state is not None
        record.load(state)
        self._saved = checkpoint
        self._trainer.guard.start()
        self._accelerator.gradient_state.dataloader_references = [None]

    def begin_window(self) -> None:
        """A step begins: what a checkpoint says if this step is never finished."""
        self._at_window = self._trainer.record.as_dict()

    @contextmanager
    def _saved_when_a_server_fails(self, trial: Any) -> Iterator[None]:
        """The weights are those of the last finished step, so what was learnt since the last checkpoint is kept."""
        trainer = self._trainer
        try:
            yield
        except ServerError as error:
            together = error.on_all_ranks or self._accelerator.num_processes == 1  # saving takes all ranks
            if together and trainer.state.global_step > 0:
                trainer.record.load(self._at_window)
                self._ends_early = True
                trainer._save_checkpoint(trainer.model, trial)
                logger.warning("a server failed; go on from %s with resume_from_checkpoint=true", self.folder(trial))
            raise

    # ------------------------------------------------------------------------------------------------- saving

    def folder(self, trial: Any) -> str:
        """Of the present step's checkpoint."""
        return os.path.join(self._trainer._get_output_dir(trial), f"checkpoint-{self._trainer.state.global_step}")

    def is_saved(self, trial: Any) -> bool:
        """Whether the present step's is there: resumed at its end, or saved at the end of a step and again at the end
        of its epoch."""
        return self._saved is not None and os.path.realpath(self._saved) == os.path.realpath(self.folder(trial))

    @contextmanager
    def saved(self, trial: Any) -> Iterator[None]:
        """Inside, the Trainer writes a checkpoint. Behind it, it is complete, and older ones may have gone; or what
        there is of it is deleted."""
        folder, writes, going_on = self.folder(trial), self._args.should_save, self.going_on
        state = self._trainer.state
        try:
            with full_disk_explained(f"checkpoint-{state.global_step}", folder, _REMEDY):
                if writes:
                    files.begin(folder, going_on.run_id)
                self._accelerator.wait_for_everyone()
                with self._until_complete():
                    yield
                self._trainer.stream.save(folder)
                if writes:
                    teacher_state.write(folder, self._trainer.teacher)
                self._accelerator.wait_for_everyone()  # every rank has written its files
                self._trainer.steering.saving(os.path.basename(folder))
                if writes:
                    about = {"belongs": going_on.facts, "seconds": self.seconds, "commands": going_on.commands}
                    kept = {**self._trainer.record.as_dict(), **about}
                    files.finish(folder, kept, going_on.run_id, going_on.number_before)
        except OSError:
            if writes:
                files.discard(folder)  # what there is of it only takes room
            raise
        self._saved = folder
        if writes:
            healthy = self._beside(self._trainer.steering.state.healthy)  # the candidate is this one
            keep, limit = [folder, state.best_model_checkpoint, healthy], self._args.save_total_limit
            files.rotate(self._trainer._get_output_dir(trial), limit, keep=keep, run=going_on.run_id)

    @contextmanager
    def _until_complete(self) -> Iterator[None]:
        """The Trainer deletes older checkpoints and pushes at the end of its own save: here, before it is complete."""
        limit, self._args.save_total_limit, self.is_saving = self._args.save_total_limit, None, True
        alone = self._args.save_only_model
        if self._ends_early or self._trainer.guard.is_stopping:  # what is saved now is to be gone on from
            self._args.save_only_model = False
        try:
            yield
        finally:
            self._args.save_total_limit, self._args.save_only_model, self.is_saving = limit, alone, False
