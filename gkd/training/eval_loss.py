"""Evaluation during training: `eval_loss` is the divergence on the data's own completions."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from gkd.assembly.rows import prepare_rows
from gkd.common.devices import sum_dtype
from gkd.common.random_state import preserved_random_state
from gkd.data.prepare import PREPARED
from gkd.data.sequences import PaddingCollator
from gkd.data.targets import Targets, target_mask
from gkd.loss.settings import FusedOutput
from gkd.training.faults import EvaluationLeft


class EvaluationMixin:
    """Data source only, nothing generated, the same normalisation as in training, no random stream moved."""

    args: Any
    accelerator: Any
    control: Any
    processing_class: Any
    data_collator: Any
    _formatting_func: Any
    encoding: dict[str, Any]
    _flush: Any
    _eval_sums: Tensor
    train_dataset: Any
    eval_dataset: Any

    def _count_evaluation(self, output: FusedOutput, labels: Tensor, targets: Targets) -> None:
        """Add this batch's sums, without the rows that accelerate repeats to make the ranks' last batches even."""
        dtype = sum_dtype(labels.device)
        per_row = torch.zeros(labels.shape[0], 2, dtype=dtype, device=labels.device)
        per_row[:, 0].index_add_(0, targets.rows, output.divergence.to(dtype))
        per_row[:, 1] = target_mask(labels).sum(dim=1)
        if self.args.loss_reduction == "sequence":
            per_row = torch.stack([per_row[:, 0] / per_row[:, 1].clamp(min=1), (per_row[:, 1] > 0).to(dtype)], dim=1)
        self._eval_sums += self.accelerator.gather_for_metrics(per_row).cpu().double().sum(dim=0)

    def _evaluate(self, trial: Any, ignore_keys: Any, skip_scheduler: bool = False) -> dict[str, float]:
        try:
            found: dict[str, float] = super()._evaluate(trial, ignore_keys, skip_scheduler)  # type: ignore[misc]
            return found
        except EvaluationLeft:
            if not skip_scheduler:
                raise
            return {}  # before the first step: nothing has been trained that could be saved

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in `transformers.Trainer`; where a signal comes during the evaluation, it is left, and the step saved."""
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        except EvaluationLeft:
            self.control.should_log = self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Data source only, nothing generated, the same normalisation as in training, no random stream moved."""
        self._eval_sums.zero_()
        gradients = self.accelerator.gradient_state
        loaders = list(gradients.dataloader_references)
        try:
            with preserved_random_state():
                loop = super().evaluation_loop  # type: ignore[misc]
                output = loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        except EvaluationLeft:
            gradients.dataloader_references = loaders  # else the loader that was left counts as the present one
            self._flush("eval")
            raise
        total, number = self._eval_sums.tolist()
        logs = self._flush("eval")
        output.metrics.update(
            {f"{metric_key_prefix}_{name}": value for name, value in logs.items() if not name.startswith("time/")}
        )
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(number, 1.0)
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `transformers.Trainer`, for rows of every form that the constructor takes; so `evaluate` is, too."""
        if isinstance(eval_dataset, str):
            sets = self._named(eval_dataset)
            if not self._is_ready(sets[eval_dataset]):
                sets[eval_dataset] = self._ready(sets[eval_dataset], eval_dataset)
        elif eval_dataset is not None:
            eval_dataset = self._ready(eval_dataset, "eval")
        elif self.eval_dataset is not None and not self._is_ready(self.eval_dataset):  # set after the constructor
            self.eval_dataset = self._ready(self.eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in `transformers.Trainer`, for rows of every form; so `predict` is, too."""
        return super().get_test_dataloader(self._ready(test_dataset, "test"))  # type: ignore[misc]

    def get_train_dataloader(self) -> Any:
        """As in `transformers.Trainer`.

        Raises:
            ValueError: `train_dataset` was set after the constructor, to rows that nobody has prepared.
        """
        if self.train_dataset is not None and not self._is_ready(self.train_dataset):
            raise ValueError(
                "trainer.train_dataset holds rows that are not prepared (ids, labels, prompts): pass them to the "
                "constructor as train_dataset, which prepares them"
            )
        return super().get_train_dataloader()  # type: ignore[misc]

    def _named(self, name: str) -> dict[str, Any]:
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if name not in sets:
            raise ValueError(f"there is no eval data set {name!r}: eval_dataset has {', '.join(sets) or 'no names'}")
        return sets

    def _is_ready(self, dataset: Any) -> bool:
        """Whether rows are as the collator takes them. A collator of the user's own knows its rows."""
        own = isinstance(self.data_collator, PaddingCollator)
        return not own or (isinstance(dataset, Dataset) and set(dataset.column_names) >= PREPARED)

    def _ready(self, dataset: Any, name: str) -> Any:
        """The rows prepared as the constructor prepares those for evaluation: with answers, whatever was done before.

        Raises:
            ValueError: as `gkd.data.prepare.prepare_dataset`.
        """
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if any(dataset is known and self._is_ready(known) for known in sets):
            return dataset
        if not isinstance(self.data_collator, PaddingCollator):
            return dataset
        _, prepared, _ = prepare_rows(
            self.args,
            self.processing_class,
            self.encoding,
            evaluation={name: dataset},
            formatting_func=self._formatting_func,
            collator=self.data_collator,
        )
        return prepared[name]
