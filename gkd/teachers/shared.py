"""Teachers without weights of their own, and several teachers in the place of one.

A base model in memory once can be the student's base and the teacher (self-distillation: the student without its
adapter), or several teachers, each with another adapter. See `gkd.adapters.second_model`.

B rows, T tokens, N targets, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gkd.batch import Targets, target_mask, targets_of
from gkd.distributed import freeze, gathered
from gkd.placement import is_sharded
from gkd.precision import mixed_precision
from gkd.signals import DenseSignal, TeacherSignal, check_head, head_of, output_layer
from gkd.teachers.local import LocalTeacher


class SharedTeacher(LocalTeacher):
    """Scores with weights that somebody else owns, too: the student, or other teachers.

    Under ZeRO-3 the owner's engine has split them up, and this model runs outside it: all of them are gathered while
    it scores, as for a rollout.
    """

    def __init__(self, model: Any, accelerator: Accelerator) -> None:
        self.head = head_of(model)
        self._head_module = output_layer(model)
        self.accelerator = accelerator
        self.model = freeze(model)
        if not getattr(model, "is_quantized", False):
            _move(model, accelerator.device)
        self._unchecked = is_sharded(model)  # cannot be run yet: when it first scores
        if not self._unchecked:
            with mixed_precision(accelerator, model):
                check_head(model, self.head)

    @torch.no_grad()
    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        with gathered(self.model.parameters()):
            return super().score(batch)


def _move(model: Any, device: torch.device) -> None:
    """In place, so that the owner's weights come along; those that are split up stand where their owner wants them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not hasattr(tensor, "ds_id"):
            tensor.data = tensor.data.to(device)


class RoutedTeacher:
    """Several teachers; each row of a batch is scored by its own (`teachers` [B], numbers in the order of `of`).

    Args:
        of: the teachers by name. They have the same output head.

    Raises:
        ValueError: an adapter with a head of its own.
    """

    model: Any = None  # there is not one

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


def _part(
    batch: dict[str, Tensor], targets: Targets, rows: list[int], own: Tensor, longest: int, width: int
) -> dict[str, Tensor]:
    """Some rows of a batch that is padded on the right, without the padding that all of them have.

    Args:
        own: which of the batch's targets are theirs. longest: tokens of the longest of them. width: of the batch.
    """
    device = targets.at.device
    at = torch.tensor(rows, device=device)
    part = {name: batch[name].index_select(0, at)[:, :longest] for name in ("input_ids", "attention_mask", "labels")}
    new_row = torch.zeros(batch["labels"].shape[0], dtype=torch.long, device=device)
    new_row.index_copy_(0, at, torch.arange(len(rows), device=device))
    row = targets.rows.index_select(0, own)
    part["target_rows"] = new_row.index_select(0, row)
    part["target_at"] = targets.at.index_select(0, own) - row * width + part["target_rows"] * longest
    part["target_ids"] = targets.ids.index_select(0, own)
    part["target_places"] = targets.places.index_select(0, own)
    return part
