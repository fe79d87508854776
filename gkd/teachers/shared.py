"""A teacher over weights that stand there already: the student's base without its adapter, or with another one.

See `gkd.models.shared_weights.second_model`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gkd.loss.signals import DenseSignal
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
    def score(self, batch: dict[str, Tensor]) -> DenseSignal:
        with gathered(self.borrowed()):
            return super().score(batch)

    def borrowed(self) -> Iterable[Tensor]:
        parameters: Iterable[Tensor] = self.model.parameters()
        return parameters


def _move(model: Any, device: torch.device) -> None:
    """In place, so that the owner's weights come along; those that are split up stand where their owner wants them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_split(tensor):
            tensor.data = tensor.data.to(device)
