"""A teacher that is asked about each sequence once: its last hidden states are kept on disk.

They are exact for every divergence and temperature, since what a divergence wants is computed from them. Kept are the
sequences that come again: rows of the data set (evaluation's too), and the teacher's own where these are cached. What
the student writes never comes again and passes through.

A row from the disk is, bit for bit, what the live teacher gave when it first met the row. What the live teacher gives
may depend in the last bits on the rows beside it, so rows that are kept and rows that pass are scored in two calls:
those that pass are then in the same company whether the others are on disk or not, and a resumed run repeats exactly.

B rows, T tokens, N targets (n of one row), Dt hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from gkd.common.errors import DiskFullError
from gkd.common.ranks import sum_over_ranks
from gkd.data.sources import SOURCES
from gkd.data.targets import IGNORE
from gkd.loss.signals import DenseSignal, Head, TeacherSignal
from gkd.models.facts import model_name, revision_of
from gkd.teachers.base import Teacher
from gkd.teachers.store import ScoreStore, row_key

logger = logging.getLogger(__name__)


class KeptTeacher(Teacher):
    """Scores from the store, and asks the live teacher about what is not there.

    Args:
        store: made for this teacher's weights.
        make_live: loads and places the live teacher, which gives a `DenseSignal`.
        head: its output head, on the accelerator, when it need not be loaded now; None loads it.
        accelerator: to agree with the other ranks.
        together: the live teacher is split up over the ranks, so all of them run it or none.
        sources: whose sequences are kept, of SOURCES.
        absent: what is known of a teacher that need not be loaded now.
    """

    def __init__(
        self,
        store: ScoreStore,
        make_live: Callable[[], Any],
        head: Head | None,
        accelerator: Accelerator,
        *,
        together: bool,
        sources: Iterable[str],
        absent: Any = None,
    ) -> None:
        self.store = store
        self.absent = absent
        self.accelerator = accelerator
        self.callbacks = [KeepScores(self)]
        self._make_live = make_live
        self._live: Any = None
        self.together = together
        self._kept = frozenset(SOURCES.index(source) for source in sources)
        self._head = self.live.head if head is None else head

    @property
    def loaded(self) -> bool:  # type: ignore[override]
        return self._live is not None

    @property
    def live(self) -> Any:
        """The teacher itself; loaded now if it was not needed before. Under ZeRO-3 all ranks come here together."""
        if self._live is None:
            self._live = self._make_live()
            self._head = self._live.head
        return self._live

    @property
    def model(self) -> Any:
        """The teacher's model; see `live`."""
        return self.live.model

    @torch.no_grad()
    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        """As `Teacher.score`; `sources` [B] says which rows are worth keeping, without it all come from the data."""
        device, width = batch["labels"].device, batch["labels"].shape[1]
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        labels = batch["labels"].tolist()
        sources = batch["sources"].tolist() if "sources" in batch else [SOURCES.index("data")] * len(labels)
        scored = [i for i, row in enumerate(labels) if any(label != IGNORE for label in row[1:])]
        keys = {
            i: row_key(ids[: lengths[i]], labels[i][: lengths[i]])
            for i, ids in enumerate(batch["input_ids"].tolist())
            if i in scored and sources[i] in self._kept
        }
        known = {i: self.store.get(key) for i, key in keys.items()}
        hidden = {i: row.to(device, non_blocking=True) for i, row in known.items() if row is not None}
        fresh = [i for i in keys if i not in hidden]
        passing = [i for i in scored if i not in keys]
        for rows, asked in zip((fresh, passing), self._over_ranks(len(fresh), len(passing)), strict=True):
            if asked:
                live = self._score_live(batch, rows, min(width, max((lengths[i] for i in rows), default=width)))
                hidden |= live
                if rows is fresh:
                    self._keep({keys[i]: row for i, row in live.items()})
        if not hidden:
            weight: Any = self._head.weight
            return DenseSignal(weight.new_empty(0, getattr(weight, "ds_shape", weight.shape)[1]), self._head)
        return DenseSignal(torch.cat([hidden[i] for i in scored]), self._head)

    def head_parameters(self) -> Iterable[Tensor | None]:
        return (self._head.weight, self._head.bias)

    def head_here(self) -> AbstractContextManager[None]:
        here: AbstractContextManager[None] = super().head_here() if self._live is None else self._live.head_here()
        return here

    def repo(self, kwargs: Any = None) -> tuple[str | None, str | None]:
        """Told without loading it."""
        if self.absent is None:
            return super().repo(kwargs)
        return model_name(self.absent), revision_of(self.absent, kwargs)

    def identity(self) -> str | None:
        """Told without loading it."""
        if self.absent is None:
            return super().identity()
        return f"{model_name(self.absent) or 'in memory'} (weights {self.absent.fingerprint[:12]})"

    def flush(self) -> None:
        """Put onto the disk what is in memory only."""
        try:
            self.store.flush()
        except DiskFullError as error:
            self._give_up(error)

    def _score_live(self, batch: dict[str, Tensor], rows: list[int], width: int) -> dict[int, Tensor]:
        """The states [n, Dt] of some rows; without any, the first row is scored for the other ranks' sake."""
        places = torch.tensor(rows or [0], device=batch["labels"].device)
        names = ("input_ids", "attention_mask", "labels")
        part = {name: batch[name].index_select(0, places)[:, :width] for name in names}
        signal = self.live.score(part)
        assert isinstance(signal, DenseSignal), type(signal)
        counts = (part["labels"][:, 1:] != IGNORE).sum(dim=1).tolist()
        return dict(zip(rows, signal.hidden.split(counts), strict=False))

    def _keep(self, rows: dict[bytes, Tensor]) -> None:
        try:
            self.store.add(rows)
        except DiskFullError as error:
            self._give_up(error)

    def _give_up(self, error: DiskFullError) -> None:
        """The training does not need the store to be complete, and room for its checkpoints more."""
        logger.warning("%s. Training goes on; no more of the teacher's scores are kept", error)
        self.store.writable = False

    def _over_ranks(self, *numbers: int) -> list[int]:
        if not self.together:
            return list(numbers)
        return [int(n) for n in sum_over_ranks(self.accelerator, torch.tensor(numbers))]


class KeepScores(TrainerCallback):
    """What was scored is on disk before a checkpoint says that its step is done, so a resumed run finds it there."""

    def __init__(self, teacher: KeptTeacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self.teacher.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In the next epoch a row may be another rank's."""
        self.teacher.flush()
        self.teacher.accelerator.wait_for_everyone()
        self.teacher.store.refresh()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.teacher.flush()
