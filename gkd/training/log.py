"""What a training log holds beside the Trainer's own loss and learning rate."""

from __future__ import annotations

import logging
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from gkd.common.ranks import max_over_ranks, sum_over_ranks
from gkd.training.completions import CompletionLog
from gkd.training.faults import FaultGuard
from gkd.training.metrics import Meter
from gkd.training.record import Record

logger = logging.getLogger(__name__)

LITTLE_MASS = 0.5  # of a teacher's top K, mean over a logging period
TRUNCATION_WARNING = 0.2  # share of truncated rollouts in one logging period


class LogTheLast(TrainerCallback):
    """Logs the last step, too: what came after the last multiple of `logging_steps` (all of a run that is shorter)
    would be missing in the log and the plots."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.logging_strategy != IntervalStrategy.NO and state.global_step >= state.max_steps:
            control.should_log = True


class TrainingLog:
    """Our metrics in every training log, reduced over ranks; sample completions; divergence along the position.

    Args:
        args: of the trainer.
        accelerator: to reduce over ranks.
        record: what the run has done so far.
        guard: knows of steps that were left out.
        completions: shows samples; None shows none.
    """

    def __init__(
        self, args: Any, accelerator: Accelerator, record: Record, guard: FaultGuard, completions: CompletionLog | None
    ) -> None:
        self._args, self._accelerator, self._record, self._guard = args, accelerator, record, guard
        self.completions = completions
        self.meters = {mode: Meter(accelerator.device, args.teacher_names) for mode in ("train", "eval")}
        self._warned_of_truncation = self._warned_of_little_mass = False

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """What the trainer is to call for the log's sake."""
        return [LogTheLast(), *([] if self.completions is None else [self.completions])]

    def observe(self, output: Any, sources: Tensor, places: Tensor, state: Any) -> None:
        """Keep what a training micro-batch shows: `output` of the fused divergence, `sources` and `places` [N]."""
        if self.completions is not None:
            self.completions.add(output.divergence)
        self._record.profile.add(output.divergence, sources, places, state.global_step, state.max_steps)

    def flush(self, mode: str) -> dict[str, float]:
        """The means since the last time, "train" or "eval". A collective."""
        return self.meters[mode].flush(self._sum, lambda values: max_over_ranks(self._accelerator, values))

    def add_to(self, logs: dict[str, float], is_training: bool) -> None:
        """Add our metrics to what the Trainer is about to log. It does so on every rank, so the reduction meets."""
        if "loss" in logs or "train_runtime" in logs:
            self._record.profile.flush(self._sum)
        if "loss" in logs and is_training:
            logs.update(self.flush("train"))
            self._warn_of_truncation(logs)
            self._warn_of_little_mass(logs)
            if self._record.nonfinite_steps:
                logs["nonfinite_steps"] = float(self._record.nonfinite_steps)
            logs.update({f"ledger/targets/{s}": float(n) for s, n in self._record.ledger.targets.items() if n})
            if self._record.empty_steps:
                logs["empty_steps"] = float(self._record.empty_steps)
            loss = self._guard.logged_loss(logs["loss"])
            if loss is None:  # nothing was trained on since the last log
                del logs["loss"]
            else:
                logs["loss"] = loss
        if "train_loss" in logs:
            logs["train_loss"] = self._guard.mean_loss(logs["train_loss"])

    def _sum(self, values: Tensor) -> Tensor:
        return sum_over_ranks(self._accelerator, values)

    def _warn_of_little_mass(self, logs: dict[str, float]) -> None:
        mass = logs.get("teacher/top_k_mass", 1.0)
        if mass < LITTLE_MASS and not self._warned_of_little_mass:
            self._warned_of_little_mass, several = True, self._args.teachers is not None
            logger.warning(
                "the teacher's %s most likely tokens hold %.3g of its probability on average, where those of a "
                "language model hold nearly all: does the server give log-probabilities of the whole vocabulary, at "
                "temperature 1? "
                "If it does, raise %s",
                "top_k" if several else self._args.teacher_top_k,
                mass,
                "top_k of those of teachers that are on servers" if several else "teacher_top_k",
            )

    def _warn_of_truncation(self, logs: dict[str, float]) -> None:
        share = logs.get("rollout/truncated", 0.0)
        if share > TRUNCATION_WARNING and not self._warned_of_truncation:
            self._warned_of_truncation = True
            logger.warning(
                "%.0f %% of the rollouts were cut off at max_new_tokens=%s without a stop token: raise it, leave cut "
                "rollouts out of the loss (mask_truncated_completions=True), or warm the student up on data (lmbda=0) "
                "or on the teacher's text (seq_kd=True) until it has learnt to stop",
                100 * share,
                self._args.max_new_tokens,
            )
