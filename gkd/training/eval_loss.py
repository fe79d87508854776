"""Evaluation during training: `eval_loss` is the divergence on the data's own completions (without a teacher their
cross-entropy), `eval_bits_per_byte` what these cost the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gkd.common.devices import sum_dtype
from gkd.common.random_state import preserved_random_state
from gkd.data.targets import Targets, target_mask
from gkd.evaluation.bits import Sizes
from gkd.loss.settings import FusedOutput
from gkd.training.faults import EvaluationLeft


class EvalLoss:
    """Data source only, nothing generated, the same normalisation as in training, no random stream moved.

    Args:
        args: `loss_reduction` says what the mean is over.
        accelerator: gathers the ranks' rows.
        flush: gives the means of the other metrics, and begins anew. A collective.
        tokenizer: the student's, for the bytes of its tokens.
    """

    def __init__(
        self, args: Any, accelerator: Accelerator, flush: Callable[[], dict[str, float]], tokenizer: Any
    ) -> None:
        self._args, self._accelerator, self._flush, self._tokenizer = args, accelerator, flush, tokenizer
        # divergence or cross-entropy, and what it is divided by; bits of the tokens that are text, and their bytes
        self._sums = torch.zeros(4, dtype=torch.float64)

    @cached_property
    def _sizes(self) -> Tensor:
        """How many bytes each id stands for; empty where that is not known."""
        return torch.tensor(Sizes.of(self._tokenizer).of_ids or [], dtype=torch.long)

    def add(self, output: FusedOutput, labels: Tensor, targets: Targets) -> None:
        """Add a batch's sums, without the rows that accelerate repeats to make the ranks' last batches even."""
        dtype = sum_dtype(labels.device)
        per_row = torch.zeros(labels.shape[0], 2, dtype=dtype, device=labels.device)
        found = output.cross_entropy if output.divergence is None else output.divergence
        assert found is not None
        per_row[:, 0].index_add_(0, targets.rows, found.to(dtype))
        per_row[:, 1] = target_mask(labels).sum(dim=1)
        if self._args.loss_reduction == "sequence":
            per_row = torch.stack([per_row[:, 0] / per_row[:, 1].clamp(min=1), (per_row[:, 1] > 0).to(dtype)], dim=1)
        per_row = torch.cat([per_row, self._of_text(output, targets, per_row)], dim=1)
        self._sums += self._accelerator.gather_for_metrics(per_row).cpu().double().sum(dim=0)

    def _of_text(self, output: FusedOutput, targets: Targets, like: Tensor) -> Tensor:
        """Bits and bytes of each row [B, 2]; a token without text counts in neither."""
        found, known = torch.zeros_like(like), len(self._sizes)
        if not known or output.cross_entropy is None:
            return found
        sizes = self._sizes.to(like.device)[targets.ids.clamp(max=known - 1)] * (targets.ids < known)
        bits = output.cross_entropy.to(like.dtype) / math.log(2) * (sizes > 0)
        return found.index_add_(0, targets.rows, torch.stack([bits, sizes.to(like.dtype)], dim=1))

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
        total, number, bits, size = self._sums.tolist()
        if size:
            logs[f"{prefix}_bits_per_byte"] = bits / size
        return {**logs, f"{prefix}_loss": total / max(number, 1.0)}
