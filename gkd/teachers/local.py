"""A teacher in this process: any causal language model, frozen.

It stays in eval mode without gradients, belongs to no optimizer and is in no checkpoint. Only its last hidden states
leave it; the fused divergence projects them, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gkd.data.targets import select_targets, targets_of
from gkd.loss.signals import DenseSignal, TeacherSignal
from gkd.models.head import check_head, head_of, output_layer
from gkd.models.hidden import last_hidden
from gkd.models.placement import head_on_accelerator, on_accelerator, place_teacher
from gkd.models.precision import mixed_precision
from gkd.models.zero import gathered, is_sharded
from gkd.teachers.base import WINDOW, Teacher


class LocalTeacher(Teacher):
    """Scores with a model in this process: held by this rank, or sharded over the ranks (`teacher_placement`).

    `alone`: it is the only teacher. Of several that come to the accelerator for their work, one is there at a time.
    """

    def __init__(self, model: Any, accelerator: Accelerator, placement: str = "same", *, alone: bool = True) -> None:
        self.head = head_of(model)
        self._head_module = output_layer(model)
        self.accelerator = accelerator
        self.model = place_teacher(model, accelerator, placement, alone=alone)
        self.scores_windows = placement == "cpu_offload"
        self._unchecked = self.together = is_sharded(
            self.model
        )  # such a model cannot be run outside its engine: when it first scores
        if not self._unchecked:
            with on_accelerator(self.model), mixed_precision(accelerator, model):
                check_head(model, self.head)

    @torch.no_grad()
    def score(self, batch: dict[str, Tensor]) -> DenseSignal:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        check, self._unchecked = self.head if self._unchecked else None, False
        # The teacher is not prepared by accelerate, so nothing else enters its autocast.
        with on_accelerator(self.model), mixed_precision(self.accelerator, self.model):
            hidden, _ = last_hidden(self.model, self._head_module, inputs, check)
        return DenseSignal(select_targets(hidden, targets_of(batch)), self.head)

    def head_parameters(self) -> Iterable[Tensor | None]:
        return (self.head.weight, self.head.bias)

    @contextmanager
    def head_here(self) -> Iterator[None]:
        with head_on_accelerator(self.model), gathered(self.head_parameters()):
            yield

    def score_window(self, batches: Sequence[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
        """While the teacher is on the accelerator: its weights travel once, not once for each micro-batch. What comes
        of it waits in CPU memory (two bytes for each of N x Dt numbers, or four)."""
        with on_accelerator(self.model):
            return [{WINDOW: self._hidden(batch, device).cpu()} for batch in batches]

    def signal_of(self, hidden: Tensor) -> TeacherSignal:
        return DenseSignal(hidden, self.head)

    def _hidden(self, batch: dict[str, Tensor], device: torch.device) -> Tensor:
        return self.score({name: value.to(device) for name, value in batch.items()}).hidden
