"""The one call by which TRL's GKDTrainer is asked, and this package, which is a drop-in for it."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from conformance.adapters import Adapter
from conformance.material import Run


class GKDLike(Adapter):
    """Attributes: trainer_class, config_class, of the package."""

    trainer_class: Any
    config_class: Any

    def trainer(self, run: Run) -> Any:
        values = run.arguments() | {
            "lmbda": run.share,
            "max_new_tokens": run.new_tokens,
            "max_length": run.max_length,
        }
        evaluated = run.eval_conversations
        return self.trainer_class(
            model=run.student,
            teacher_model=run.teacher,
            args=self.config_class(**values),
            train_dataset=Dataset.from_list([{"messages": row} for row in run.conversations]),
            eval_dataset=Dataset.from_list([{"messages": row} for row in evaluated]) if evaluated else None,
            processing_class=run.tokenizer,
        )
