"""What a training log holds beside the Trainer's own loss and learning rate."""

from __future__ import annotations

import logging
from typing import Any

from gkd.distributed import max_over_ranks, sum_over_ranks
from gkd.faults import FaultGuard
from gkd.metrics import Ledger, Meter

logger = logging.getLogger(__name__)

TRUNCATION_WARNING = 0.2  # share of truncated rollouts in one logging period


class LoggingMixin:
    """Our metrics in every training log, reduced over ranks."""

    args: Any
    accelerator: Any
    model: Any
    ledger: Ledger
    guard: FaultGuard
    _meters: dict[str, Meter]
    _warned_of_truncation = False

    def _flush(self, mode: str) -> dict[str, float]:
        return self._meters[mode].flush(
            lambda values: sum_over_ranks(self.accelerator, values),
            lambda values: max_over_ranks(self.accelerator, values),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics to a training log. The Trainer calls this on every rank, so the reduction meets."""
        if "loss" in logs and self.model.training:
            logs.update(self._flush("train"))
            self._warn_of_truncation(logs)
            if self.guard.nonfinite_steps:
                logs["nonfinite_steps"] = float(self.guard.nonfinite_steps)
            logs.update({f"ledger/targets/{s}": float(n) for s, n in self.ledger.targets.items() if n})
        super().log(logs, start_time)  # type: ignore[misc]

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
