"""Evaluation during training: `eval_loss` is the divergence on the data's own completions."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from gkd.batch import target_mask
from gkd.fused import FusedOutput
from gkd.metrics import sum_dtype
from gkd.preparation import prepare_rows
from gkd.random_state import preserved_random_state


class EvaluationMixin:
    """Data source only, nothing generated, the same normalisation as in training, no random stream moved."""

    args: Any
    accelerator: Any
    processing_class: Any
    data_collator: Any
    _formatting_func: Any
    encoding: dict[str, Any]
    _flush: Any
    _eval_sums: Tensor

    def _count_evaluation(self, output: FusedOutput, inputs: dict[str, Tensor]) -> None:
        """Add this batch's sums, without the rows that accelerate repeats to make the ranks' last batches even."""
        labels = inputs["labels"]
        mask = target_mask(labels)
        dtype = sum_dtype(labels.device)
        per_row = torch.zeros(labels.shape[0], 2, dtype=dtype, device=labels.device)
        rows = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(mask)[mask]
        per_row[:, 0].index_add_(0, rows, output.divergence.to(dtype))
        per_row[:, 1] = mask.sum(dim=1)
        if self.args.loss_reduction == "sequence":
            per_row = torch.stack([per_row[:, 0] / per_row[:, 1].clamp(min=1), (per_row[:, 1] > 0).to(dtype)], dim=1)
        self._eval_sums += self.accelerator.gather_for_metrics(per_row).cpu().double().sum(dim=0)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Data source only, nothing generated, the same normalisation as in training, no random stream moved."""
        self._eval_sums.zero_()
        with preserved_random_state():
            loop = super().evaluation_loop  # type: ignore[misc]
            output = loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, number = self._eval_sums.tolist()
        logs = self._flush("eval")
        output.metrics.update(
            {f"{metric_key_prefix}_{name}": value for name, value in logs.items() if not name.startswith("time/")}
        )
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(number, 1.0)
        return output

    def evaluate(self, eval_dataset: Any = None, **kwargs: Any) -> dict[str, float]:
        """As in `transformers.Trainer`; raw rows are prepared first."""
        if isinstance(eval_dataset, Dataset) and "input_ids" not in eval_dataset.column_names:
            given = (self.processing_class, self.args, self._formatting_func, self.data_collator, self.encoding)
            _, eval_dataset, _ = prepare_rows(None, eval_dataset, *given)
        return super().evaluate(eval_dataset=eval_dataset, **kwargs)  # type: ignore[misc]
