"""Saving and resuming: a killed run loses nothing that was saved, and goes on as if it had not been killed.

Sources and rollouts need no state: they are functions of (seed, step, row). Beside the Trainer's own files only the
ledger, the token count and the number of skipped steps are kept, in the file that also says that the checkpoint is
complete (`gkd.checkpoint_files`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gkd import checkpoint_files as files
from gkd.disk import full_disk_explained
from gkd.distributed import max_over_ranks
from gkd.faults import FaultGuard
from gkd.metrics import Ledger
from gkd.positions import PositionProfile
from gkd.vllm_client import ServerError

logger = logging.getLogger(__name__)

_REMEDY = (
    "Earlier checkpoints are untouched: make room (save_total_limit bounds how many are kept), then go on with "
    "resume_from_checkpoint=true"
)


class CheckpointMixin:
    """Checkpoints that are complete or not there, under every DeepSpeed stage alike; stops by a signal."""

    args: Any
    state: Any
    accelerator: Any
    ledger: Ledger
    positions: PositionProfile
    guard: FaultGuard
    _get_output_dir: Any
    _total_train_tokens: int
    _at_window: dict[str, Any]
    model: Any
    _is_saving = False
    _saved: str | None = None  # the checkpoint of the present step, once there is one

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
        checkpoint = self._resolve(resume_from_checkpoint or None)
        if checkpoint is not None:
            self._load_state(checkpoint)
        self._saved = checkpoint
        self.guard.start()
        with self.guard.request, self._saved_when_a_server_fails(trial):
            output = super().train(checkpoint, trial, *args, **kw)  # type: ignore[misc]
        self.guard.raise_if_stopped(self.state, self._folder(trial))
        return output

    def _resolve(self, wanted: str | bool | None) -> str | None:
        checkpoint = files.find(self.args.output_dir) if wanted is True else wanted
        step = -1 if checkpoint is None else files.step_of(str(checkpoint))
        steps = torch.tensor([step, -step])
        if self.accelerator.num_processes > 1:
            steps = max_over_ranks(self.accelerator, steps)
        if int(steps[0]) != -int(steps[1]):
            raise ValueError(
                f"resume_from_checkpoint={wanted}: ranks see different checkpoints (steps {-int(steps[1])} to "
                f"{int(steps[0])}): output_dir={self.args.output_dir!r} must be shared by all machines"
            )
        if wanted is True and checkpoint is None:
            raise ValueError(f"resume_from_checkpoint=True: {self.args.output_dir} holds no complete checkpoint")
        if isinstance(checkpoint, str) and wanted is not True:
            fault = files.fault_of(checkpoint)
            if fault is not None:
                raise ValueError(
                    f"resume_from_checkpoint={checkpoint!r} is not complete ({fault}): pass another, or true for the "
                    "complete one saved last"
                )
        assert checkpoint is None or isinstance(checkpoint, str), checkpoint
        return checkpoint

    def _load_state(self, checkpoint: str) -> None:
        state = files.read_state(checkpoint)
        if state is not None:
            self._set_own_state(state)

    def _set_own_state(self, state: dict[str, Any]) -> None:
        self.ledger.load(state["ledger"])
        if "positions" in state:
            self.positions.load(state["positions"])
        self._total_train_tokens = state["num_tokens"]
        self.guard.nonfinite_steps = state.get("nonfinite_steps", 0)

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
                    files.begin(folder)
                self.accelerator.wait_for_everyone()
                with self._until_complete():
                    super()._save_checkpoint(model, trial)  # type: ignore[misc]
                self.accelerator.wait_for_everyone()  # every rank has written its files
                if writes:
                    files.finish(folder, self._own_state())
        except OSError:
            if writes:
                files.discard(folder)  # what there is of it only takes room
            raise
        self._saved = folder
        if writes:
            best = self.state.best_model_checkpoint
            files.rotate(self._get_output_dir(trial), self.args.save_total_limit, keep=[folder, best])
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)

    def _own_state(self) -> dict[str, Any]:
        return {
            "ledger": self.ledger.as_dict(),
            "num_tokens": self._total_train_tokens,
            "positions": self.positions.as_dict(),
            "nonfinite_steps": self.guard.nonfinite_steps,
        }

    def _begin_window(self) -> None:
        """A step begins: what a checkpoint says if this step is never finished."""
        self._at_window = self._own_state()

    @contextmanager
    def _saved_when_a_server_fails(self, trial: Any) -> Iterator[None]:
        """The weights are those of the last finished step, so what was learnt since the last checkpoint is kept."""
        try:
            yield
        except ServerError as error:
            together = error.on_all_ranks or self.accelerator.num_processes == 1  # saving takes all ranks
            if together and self.state.global_step > 0:
                self._set_own_state(self._at_window)
                self._save_checkpoint(self.model, trial)
                logger.warning("a server failed; go on from %s with resume_from_checkpoint=true", self._folder(trial))
            raise

    @contextmanager
    def _until_complete(self) -> Iterator[None]:
        """The Trainer deletes older checkpoints and pushes at the end of its own save: here, before it is complete."""
        limit, self.args.save_total_limit, self._is_saving = self.args.save_total_limit, None, True
        try:
            yield
        finally:
            self.args.save_total_limit, self._is_saving = limit, False

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
