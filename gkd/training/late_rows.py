"""Rows that come to a trainer after its constructor: prepared where they are evaluated on, refused for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from gkd.assembly.rows import prepare_rows
from gkd.data.prepared_row import PREPARED
from gkd.data.sequences import PaddingCollator


class LateRows:
    """Looks at the rows that a data loader is about to be made of.

    Args:
        trainer: its data sets and collator may be set at any time.
        formatting_func: as the constructor was given it.
    """

    def __init__(self, trainer: Any, formatting_func: Callable[..., Any] | None) -> None:
        self._trainer, self._formatting_func = trainer, formatting_func

    def check_train(self) -> None:
        """Before a data loader of the training rows.

        Raises:
            ValueError: `train_dataset` was set after the constructor, to rows that nobody has prepared.
        """
        dataset = self._trainer.train_dataset
        if dataset is not None and not self._is_ready(dataset):
            raise ValueError(
                "trainer.train_dataset holds rows that are not prepared (ids, labels, prompts): pass them to the "
                "constructor as train_dataset, which prepares them"
            )

    def for_evaluation(self, wanted: Any) -> Any:
        """What `get_eval_dataloader` was asked for, rows or the name of a set, with its rows prepared."""
        trainer = self._trainer
        if isinstance(wanted, str):
            sets = self._named(wanted)
            if not self._is_ready(sets[wanted]):
                sets[wanted] = self.ready(sets[wanted], wanted)
        elif wanted is not None:
            return self.ready(wanted, "eval")
        elif trainer.eval_dataset is not None and not self._is_ready(trainer.eval_dataset):
            trainer.eval_dataset = self.ready(trainer.eval_dataset, "eval")
        return wanted

    def ready(self, dataset: Any, name: str) -> Any:
        """The rows prepared as the constructor prepares those for evaluation: with answers, whatever was done before.

        Raises:
            ValueError: as `gkd.data.prepare.prepare_dataset`.
        """
        trainer = self._trainer
        held = trainer.eval_dataset
        sets = held.values() if isinstance(held, dict) else [held]
        if any(dataset is known and self._is_ready(known) for known in sets):
            return dataset
        if not isinstance(trainer.data_collator, PaddingCollator):
            return dataset
        _, prepared, _ = prepare_rows(
            trainer.args,
            trainer.processing_class,
            trainer.encoding,
            evaluation={name: dataset},
            formatting_func=self._formatting_func,
            collator=trainer.data_collator,
        )
        return prepared[name]

    def _named(self, name: str) -> dict[str, Any]:
        held = self._trainer.eval_dataset
        sets = held if isinstance(held, dict) else {}
        if name not in sets:
            raise ValueError(f"there is no eval data set {name!r}: eval_dataset has {', '.join(sets) or 'no names'}")
        return sets

    def _is_ready(self, dataset: Any) -> bool:
        """Whether rows are as the collator takes them. A collator of the user's own knows its rows."""
        own = isinstance(self._trainer.data_collator, PaddingCollator)
        return not own or (isinstance(dataset, Dataset) and set(dataset.column_names) >= PREPARED)
