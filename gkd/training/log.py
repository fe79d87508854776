"""What a training log holds beside the Trainer's own loss and learning rate."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from gkd.common.ranks import max_over_ranks, sum_over_ranks
from gkd.common.redact import redact_process_arguments
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


class LoggingMixin:
    """Our metrics in every training log, reduced over ranks; sample completions; divergence along the position."""

    args: Any
    state: Any
    accelerator: Any
    model: Any
    record: Record
    guard: FaultGuard
    _meters: dict[str, Meter]
    hygiene: Any
    processing_class: Any
    callback_handler: Any
    add_callback: Any
    completions: CompletionLog | None = None
    _warned_of_truncation = False
    _warned_of_little_mass = False

    def _set_up_logging(self) -> None:
        if self.args.report_to:
            redact_process_arguments()
        self.add_callback(LogTheLast())
        if self.args.log_completions:
            self.completions = CompletionLog(
                self.processing_class,
                self.hygiene,
                lambda: self.callback_handler.callbacks,
                self.args.log_completions_steps,
                self.args.num_completions_to_print,
            )
            self.add_callback(self.completions)

    def _observe(self, output: Any, sources: Tensor, places: Tensor) -> None:
        """Keep what a training micro-batch shows: `output` of the fused divergence, `sources` and `places` [N]."""
        if self.completions is not None:
            self.completions.add(output.divergence)
        done = (self.state.global_step, self.state.max_steps)
        self.record.positions.add(output.divergence, sources, places, *done)

    def _flush(self, mode: str) -> dict[str, float]:
        return self._meters[mode].flush(
            lambda values: sum_over_ranks(self.accelerator, values),
            lambda values: max_over_ranks(self.accelerator, values),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics to a training log. The Trainer calls this on every rank, so the reduction meets."""
        if "loss" in logs or "train_runtime" in logs:
            self.record.positions.flush(lambda values: sum_over_ranks(self.accelerator, values))
        if "loss" in logs and self.model.training:
            logs.update(self._flush("train"))
            self._warn_of_truncation(logs)
            self._warn_of_little_mass(logs)
            if self.record.nonfinite_steps:
                logs["nonfinite_steps"] = float(self.record.nonfinite_steps)
            logs.update({f"ledger/targets/{s}": float(n) for s, n in self.record.ledger.targets.items() if n})
            if self.record.empty_steps:
                logs["empty_steps"] = float(self.record.empty_steps)
            loss = self.guard.logged_loss(logs["loss"])
            if loss is None:  # nothing was trained on since the last log
                del logs["loss"]
            else:
                logs["loss"] = loss
        if "train_loss" in logs:
            logs["train_loss"] = self.guard.mean_loss(logs["train_loss"])
        super().log(logs, start_time)  # type: ignore[misc]
        if "train_runtime" in logs:  # the training is over: for the plots and metrics.jsonl, not for loggers
            self.state.log_history[-1]["divergence_by_position"] = self.record.positions.as_dict()

    def _warn_of_little_mass(self, logs: dict[str, float]) -> None:
        mass = logs.get("teacher/top_k_mass", 1.0)
        if mass < LITTLE_MASS and not self._warned_of_little_mass:
            self._warned_of_little_mass = True
            logger.warning(
                "the teacher's %d most likely tokens hold %.3g of its probability on average, where those of a "
                "language model hold nearly all: does the server give log-probabilities of the whole vocabulary, at "
                "temperature 1? "
                "If it does, raise teacher_top_k",
                self.args.teacher_top_k,
                mass,
            )

    def _warn_of_truncation(self, logs: dict[str, float]) -> None:
        share = logs.get("rollout/truncated", 0.0)
        if share > TRUNCATION_WARNING and not self._warned_of_truncation:
            self._warned_of_truncation = True
            logger.warning(
                "%.0f %% of the rollouts were cut off at max_new_tokens=%d without a stop token: raise it, leave cut "
                "rollouts out of the loss (mask_truncated_completions=True), or warm the student up on data (lmbda=0) "
                "or on the teacher's text (seq_kd=True) until it has learnt to stop",
                100 * share,
                self.args.max_new_tokens,
            )
