"""Evaluation during training: `eval_loss` is the divergence on the data's own completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gkd.common.devices import sum_dtype
from gkd.common.random_state import preserved_random_state
from gkd.data.targets import Targets, target_mask
from gkd.loss.settings import FusedOutput
from gkd.training.faults import EvaluationLeft


class EvalLoss:
    """Data source only, nothing generated, the same normalisation as in training, no random stream moved.

    Args:
        args: `loss_reduction` says what the mean is over.
        accelerator: gathers the ranks' rows.
        flush: gives the means of the other metrics, and begins anew. A collective.
    """

    def __init__(self, args: Any, accelerator: Accelerator, flush: Callable[[], dict[str, float]]) -> None:
        self._args, self._accelerator, self._flush = args, accelerator, flush
        self._sums = torch.zeros(2, dtype=torch.float64)  # the divergence, and what it is divided by

    def add(self, output: FusedOutput, labels: Tensor, targets: Targets) -> None:
        """Add a batch's sums, without the rows that accelerate repeats to make the ranks' last batches even."""
        dtype = sum_dtype(labels.device)
        per_row = torch.zeros(labels.shape[0], 2, dtype=dtype, device=labels.device)
        per_row[:, 0].index_add_(0, targets.rows, output.divergence.to(dtype))
        per_row[:, 1] = target_mask(labels).sum(dim=1)
        if self._args.loss_reduction == "sequence":
            per_row = torch.stack([per_row[:, 0] / per_row[:, 1].clamp(min=1), (per_row[:, 1] > 0).to(dtype)], dim=1)
        self._sums += self._accelerator.gather_for_metrics(per_row).cpu().double().sum(dim=0)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """One evaluation happens inside."""
        self._sums.zero_()
        gradients = self._accelerator.gradient_state
        loaders = list(gradients.dataloader_references)
        try:
            with preserved_random_state():
                yield
        except EvaluationLeft:
            gradients.dataloader_references = loaders  # else the loader that was left counts as the present one
            self._flush()
            raise

    def metrics(self, prefix: str) -> dict[str, float]:
        """What the evaluation has found, by log name. A collective."""
        logs = {f"{prefix}_{name}": value for name, value in self._flush().items() if not name.startswith("time/")}
        total, number = self._sums.tolist()
        return {**logs, f"{prefix}_loss": total / max(number, 1.0)}
