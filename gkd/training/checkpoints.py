"""Saving and resuming: a killed run loses nothing that was saved, and goes on as if it had not been killed.

Sources and rollouts need no state: they are functions of (seed, step, row). Beside the Trainer's own files only the
record (`gkd.training.record`) is kept, in the file that also says that the checkpoint is complete
(`gkd.training.checkpoint_files`).
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
from gkd.training import output_folder
from gkd.training.faults import FaultGuard
from gkd.training.going_on import GoingOnMixin
from gkd.training.record import Record

logger = logging.getLogger(__name__)

_REMEDY = (
    "Earlier checkpoints are untouched: make room (save_total_limit bounds how many are kept), then go on with "
    "resume_from_checkpoint=true"
)


class CheckpointMixin(GoingOnMixin):
    """Checkpoints that are complete or not there, under every DeepSpeed stage alike; stops by a signal."""

    args: Any
    state: Any
    accelerator: Any
    record: Record
    guard: FaultGuard
    _get_output_dir: Any
    _push_from_checkpoint: Any
    stream: Any
    _at_window: dict[str, Any]
    model: Any
    _is_saving = False
    _saved: str | None = None  # the checkpoint of the present step, once there is one
    _started: float | None = None  # when the present training was
    _seconds_before = 0.0  # of the run, before it
    _ends_early = False  # by a server

    # ----------------------------------------------------------------------------------------------- resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kw: Any) -> Any:
        """As in `transformers.Trainer`; True resumes from the complete checkpoint in `output_dir` saved last.

        Raises:
            ValueError: there is no such checkpoint, it is not complete, or ranks see different ones.
            TrainingStopped: SIGTERM or SIGINT; a checkpoint was saved.
            NotFiniteError: `max_nonfinite_steps` steps in a row were skipped; a checkpoint was saved.
            DiskFullError: a checkpoint could not be saved.
            ServerError: a server failed for too long; a checkpoint was saved.
        """
        with ExitStack() as held:
            lock = output_folder.locked(self.args.output_dir)
            self._first_rank(lambda: held.enter_context(lock))
            self._check_folder_is_shared()
            checkpoint = self._resolve(resume_from_checkpoint)
            self._check_belongs(checkpoint)
            self._seconds_before, self.commands = 0.0, []
            if checkpoint is not None:
                self._load_state(checkpoint)
            self._choose_run(checkpoint)
            self._saved, self._started, self._ends_early = checkpoint, time.monotonic(), False
            self.guard.start()
            try:
                with self.guard.request, self._saved_when_a_server_fails(trial), self.stream.around():
                    output = super().train(checkpoint, trial, *args, **kw)  # type: ignore[misc]
            finally:
                self.guard.is_training = False
            self._seconds_before, self._started = self.training_seconds, None
            self.guard.raise_if_stopped(self.state, self._folder(trial))
            return output._replace(training_loss=output.metrics["train_loss"])

    def _load_state(self, checkpoint: str) -> None:
        state = files.read_state(checkpoint)
        if state is not None and "ledger" in state:
            self.record.load(state)
            self._seconds_before = float(state.get("seconds", 0.0))
            self.commands = list(state.get("commands", ()))

    @property
    def training_seconds(self) -> float:
        """Of the whole run, over resumes, up to now."""
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    # ------------------------------------------------------------------------------------------------- saving

    def _folder(self, trial: Any) -> str:
        return os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, writes = self._folder(trial), self.args.should_save
        if self._saved is not None and os.path.realpath(self._saved) == os.path.realpath(folder):
            return  # resumed at its end, or saved at the end of a step and again at the end of its epoch
        try:
            with full_disk_explained(f"checkpoint-{self.state.global_step}", folder, _REMEDY):
                if writes:
                    files.begin(folder, self.run_id)
                self.accelerator.wait_for_everyone()
                with self._until_complete():
                    super()._save_checkpoint(model, trial)  # type: ignore[misc]
                self.accelerator.wait_for_everyone()  # every rank has written its files
                if writes:
                    about = {"belongs": self._facts, "seconds": self.training_seconds, "commands": self.commands}
                    files.finish(folder, {**self.record.as_dict(), **about}, self.run_id, self._number_before)
        except OSError:
            if writes:
                files.discard(folder)  # what there is of it only takes room
            raise
        self._saved = folder
        if writes:
            best = self.state.best_model_checkpoint
            files.rotate(self._get_output_dir(trial), self.args.save_total_limit, keep=[folder, best], run=self.run_id)
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)

    def _begin_window(self) -> None:
        """A step begins: what a checkpoint says if this step is never finished."""
        self._at_window = self.record.as_dict()

    @contextmanager
    def _saved_when_a_server_fails(self, trial: Any) -> Iterator[None]:
        """The weights are those of the last finished step, so what was learnt since the last checkpoint is kept."""
        try:
            yield
        except ServerError as error:
            together = error.on_all_ranks or self.accelerator.num_processes == 1  # saving takes all ranks
            if together and self.state.global_step > 0:
                self.record.load(self._at_window)
                self._ends_early = True
                self._save_checkpoint(self.model, trial)
                logger.warning("a server failed; go on from %s with resume_from_checkpoint=true", self._folder(trial))
            raise

    @contextmanager
    def _until_complete(self) -> Iterator[None]:
        """The Trainer deletes older checkpoints and pushes at the end of its own save: here, before it is complete."""
        limit, self.args.save_total_limit, self._is_saving = self.args.save_total_limit, None, True
        alone = self.args.save_only_model
        if self._ends_early or self.guard.is_stopping:  # what is saved now is to be gone on from
            self.args.save_only_model = False
        try:
            yield
        finally:
            self.args.save_total_limit, self.args.save_only_model, self._is_saving = limit, alone, False
