"""Several teachers in the place of one: each row is scored by its own.

They may be of any kinds. Where all of them have one output head, a micro-batch's targets are compared in one pass;
else the signal is in parts (`gkd.loss.parts`).

B rows, T tokens, N targets, n of one teacher, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gkd.data.targets import IGNORE, target_mask, targets_of
from gkd.loss.integrand import Divergence
from gkd.loss.parts import SignalPart, SplitSignal
from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal, TeacherSignal
from gkd.models.zero import gathered, is_split
from gkd.teachers.base import WINDOW, Teacher


@dataclass(frozen=True)
class Compared:
    """How a teacher's rows are compared with it.

    Attributes:
        settings: the loss's, as they are for this teacher; None is as for all.
        weight: multiplies its divergence.
    """

    settings: LossSettings | None = None
    weight: float = 1.0


class RoutedTeacher(Teacher):
    """Several teachers; each row of a batch is scored by its own (`teachers` [B], numbers in the order of `of`).

    Args:
        of: the teachers by name.
        compared: how each is, in the same order; none: all alike.
    """

    def __init__(self, of: Mapping[str, Teacher], compared: Sequence[Compared] = ()) -> None:
        self.of = dict(of)
        self.teachers = list(of.values())
        self.compared = list(compared) or [Compared()] * len(self.teachers)
        self.callbacks = [callback for teacher in self.teachers for callback in teacher.callbacks]
        self.remote = any(teacher.remote for teacher in self.teachers)
        self.together = any(teacher.together for teacher in self.teachers)
        self.scores_windows = any(teacher.scores_windows for teacher in self.teachers)

    @property
    def loaded(self) -> bool:  # type: ignore[override]
        return all(teacher.loaded for teacher in self.teachers)

    @torch.no_grad()
    def score(self, batch: dict[str, Tensor]) -> TeacherSignal | SplitSignal:
        """As `Teacher.score`; each teacher that has a row in the batch is asked once, about all of its rows.

        Ranks differ in whose rows they hold. What another engine has split up is gathered here, once, on all of them;
        a teacher that all ranks ask at once, or whose head they gather for the loss, is asked without a row, too.
        Servers come last: where one fails on this rank, no other rank is left waiting.
        """
        rows, one_head = _Rows(batch), self._has_one_head()
        said: dict[int, TeacherSignal] = {}
        with gathered(parameter for teacher in self.teachers for parameter in teacher.borrowed()):
            for number in sorted(range(len(self.teachers)), key=lambda number: self.teachers[number].remote):
                teacher, kept = self.teachers[number], batch.get(_kept_as(number))
                if kept is not None:
                    said[number] = teacher.signal_of(kept)
                elif rows.of(number) or teacher.together or (not one_head and _has_split_head(teacher)):
                    signal = teacher.score(rows.part(number))
                    assert not isinstance(signal, SplitSignal), "one of several teachers is several"
                    said[number] = signal
        if one_head:
            return self._in_one(said, rows)
        return SplitSignal([self._part(number, said[number], rows) for number in sorted(said)])

    def _part(self, number: int, signal: TeacherSignal, rows: _Rows) -> SignalPart:
        how, here = self.compared[number], self.teachers[number].head_here
        return SignalPart(rows.places(number), signal, how.settings, how.weight, here)

    def _in_one(self, said: Mapping[int, TeacherSignal], rows: _Rows) -> DenseSignal:
        """The signals of teachers that have one head, as one."""
        hidden: Tensor | None = None
        for number, signal in said.items():
            assert isinstance(signal, DenseSignal)
            if hidden is None:
                hidden = signal.hidden.new_empty(len(rows.targets.ids), signal.hidden.shape[1])
                head = signal.head
            hidden.index_copy_(0, rows.places(number).to(hidden.device), signal.hidden)
        assert hidden is not None, "a batch without rows"
        return DenseSignal(hidden, head)

    def _has_one_head(self) -> bool:
        """Whether one projection, and one comparison, is that of all of them."""
        weights = {id(next(iter(teacher.head_parameters()), teacher)) for teacher in self.teachers}
        alike = all(how == self.compared[0] for how in self.compared)
        return len(weights) == 1 and alike and self.compared[0] == Compared()

    def head_parameters(self) -> Iterable[Tensor | None]:
        return self.teachers[0].head_parameters()

    def head_here(self) -> AbstractContextManager[None]:
        """Where they have one head; each part of another signal has its own."""
        return self.teachers[0].head_here()

    def each(self) -> Sequence[Teacher]:
        return self.teachers

    def compare_by(self, divergence: Divergence) -> None:
        self.compared = [
            how if how.settings is None else replace(how, settings=replace(how.settings, divergence=divergence))
            for how in self.compared
        ]

    def settings_of_each(self) -> Sequence[LossSettings | None]:
        return [how.settings for how in self.compared]

    def repo(self, kwargs: Any = None) -> tuple[str | None, str | None]:
        """Where all of them have the same name: several adapters on one base."""
        found = {teacher.repo(kwargs) for teacher in self.teachers}
        return found.pop() if len(found) == 1 else (None, None)

    def score_window(self, batches: Sequence[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
        """As `Teacher.score_window`, of those that come to the accelerator for it: one after the other, once each."""
        kept: list[dict[str, Tensor]] = [{} for _ in batches]
        of_batches = [_Rows(batch) for batch in batches]
        for number, teacher in enumerate(self.teachers):
            if not teacher.scores_windows:
                continue
            places = [place for place, rows in enumerate(of_batches) if rows.of(number)]
            found = (
                teacher.score_window([of_batches[place].part(number) for place in places], device) if places else []
            )
            for place, one in zip(places, found, strict=True):
                kept[place][_kept_as(number)] = one[WINDOW]
        return kept


_OF_TOKENS = ("input_ids", "attention_mask", "labels")
_OF_ROWS: tuple[str, ...] = (*_OF_TOKENS, "sources")


def _kept_as(number: int) -> str:
    return f"{WINDOW}_{number}"


def _has_split_head(teacher: Teacher) -> bool:
    return any(parameter is not None and is_split(parameter) for parameter in teacher.head_parameters())


class _Rows:
    """A batch that is padded on the right, taken apart by teachers. Waits for its device once."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self._batch, self.targets = batch, targets_of(batch)
        columns = (batch["teachers"], batch["attention_mask"].sum(dim=1), target_mask(batch["labels"]).sum(dim=1))
        numbers, self._lengths, counts = torch.stack(columns).tolist()
        self._places = torch.arange(sum(counts)).split(counts)
        self._of: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            self._of.setdefault(number, []).append(row)

    def of(self, number: int) -> list[int]:
        """The rows of that teacher."""
        return self._of.get(number, [])

    def places(self, number: int) -> Tensor:
        """[n] which of the batch's targets are theirs."""
        none = torch.empty(0, dtype=torch.long)
        places = torch.cat([none, *(self._places[row] for row in self.of(number))])
        return places.to(self.targets.at.device)

    def part(self, number: int) -> dict[str, Tensor]:
        """The rows of that teacher as a batch, without the padding that all of them have. Where it has none, one token
        without a target: something to ask it for the other ranks' sake."""
        batch, targets, device = self._batch, self.targets, self.targets.at.device
        rows = self.of(number)
        longest = max((self._lengths[row] for row in rows), default=1)
        at = torch.tensor(rows or [0], device=device)
        part = {name: batch[name].index_select(0, at) for name in _OF_ROWS if name in batch}
        part |= {name: part[name][:, :longest] for name in _OF_TOKENS}
        if not rows:
            part["labels"] = torch.full_like(part["labels"], IGNORE)
        own, width = self.places(number), batch["labels"].shape[1]
        new_row = torch.zeros(batch["labels"].shape[0], dtype=torch.long, device=device)
        new_row.index_copy_(0, at, torch.arange(len(at), device=device))
        row = targets.rows.index_select(0, own)
        part["target_rows"] = new_row.index_select(0, row)
        part["target_at"] = targets.at.index_select(0, own) - row * width + part["target_rows"] * longest
        part["target_ids"] = targets.ids.index_select(0, own)
        part["target_places"] = targets.places.index_select(0, own)
        return part
