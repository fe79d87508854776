"""A teacher over weights that stand there already: the student's base without its adapter, or with another one.

See `gkd.models.shared_weights.second_model`. B rows, T tokens, N targets, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gkd.data.targets import Targets
from gkd.loss.signals import TeacherSignal
from gkd.models.head import check_head, head_of, output_layer
from gkd.models.placement import freeze
from gkd.models.precision import mixed_precision
from gkd.models.zero import gathered, is_sharded, is_split
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
        self.model = self._made_ready(model)
        if not getattr(model, "is_quantized", False):
            _move(model, accelerator.device)
        self._unchecked = is_sharded(model)  # cannot be run yet: when it first scores
        if not self._unchecked:
            with mixed_precision(accelerator, model):
                check_head(model, self.head)

    def _made_ready(self, model: Any) -> Any:
        return freeze(model)

    @torch.no_grad()
    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        with gathered(self.model.parameters()):
            return super().score(batch)


def _move(model: Any, device: torch.device) -> None:
    """In place, so that the owner's weights come along; those that are split up stand where their owner wants them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_split(tensor):
            tensor.data = tensor.data.to(device)


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
