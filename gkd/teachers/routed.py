"""Several teachers in the place of one: each row is scored by its own.

B rows, T tokens, N targets, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gkd.data.targets import target_mask, targets_of
from gkd.loss.signals import DenseSignal, TeacherSignal
from gkd.models.zero import gathered
from gkd.teachers.base import Teacher
from gkd.teachers.shared import SharedTeacher, _part


class RoutedTeacher(Teacher):
    """Several teachers; each row of a batch is scored by its own (`teachers` [B], numbers in the order of `of`).

    Args:
        of: the teachers by name. They have the same output head.

    Raises:
        ValueError: an adapter with a head of its own.
    """

    def __init__(self, of: Mapping[str, SharedTeacher]) -> None:
        self.of = dict(of)
        self.teachers = list(of.values())
        self.head = self.teachers[0].head
        for name, teacher in of.items():
            if teacher.head.weight is not self.head.weight:
                raise ValueError(
                    f"teacher_adapters: {name!r} has an output head of its own (modules_to_save), and the rows of a "
                    "micro-batch are projected together: use adapters that leave the head alone"
                )

    @torch.no_grad()
    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        """As `Teacher.score`; one forward pass for each teacher that has a row in the batch."""
        targets, width = targets_of(batch), batch["labels"].shape[1]
        columns = (batch["teachers"], batch["attention_mask"].sum(dim=1), target_mask(batch["labels"]).sum(dim=1))
        numbers, lengths, counts = torch.stack(columns).tolist()  # the one wait for the device
        places = torch.arange(sum(counts)).split(counts)
        hidden: Tensor | None = None
        # Ranks differ in whose rows they hold: what is split up is gathered here, once, on all of them.
        with gathered(parameter for teacher in self.teachers for parameter in teacher.model.parameters()):
            for number in sorted(set(numbers)):
                rows = [row for row, whose in enumerate(numbers) if whose == number]
                own = torch.cat([places[row] for row in rows]).to(targets.at.device)
                longest = max(lengths[row] for row in rows)
                signal = self.teachers[number].score(_part(batch, targets, rows, own, longest, width))
                assert isinstance(signal, DenseSignal)
                if hidden is None:
                    hidden = signal.hidden.new_empty(sum(counts), signal.hidden.shape[1])
                hidden.index_copy_(0, own.to(hidden.device), signal.hidden)
        assert hidden is not None, "a batch without rows"
        return DenseSignal(hidden, self.head)

    def head_parameters(self) -> Iterable[Tensor | None]:
        return self.teachers[0].head_parameters()

    def each(self) -> Sequence[Teacher]:
        return self.teachers

    def repo(self, kwargs: Any = None) -> tuple[str | None, str | None]:
        """Several adapters on one base."""
        return self.teachers[0].repo(kwargs)
