"""A student's moving average as its teacher (`self_teacher="ema"`).

The mean teacher of Tarvainen and Valpola (arXiv 1703.01780, section 2) over what an adapter trains:

    teacher <- decay * teacher + (1 - decay) * student, after each optimizer step

They average with 0.99 while the student still learns fast, 0.999 later; self-distillation fine-tuning (Shenfeld et
al., arXiv 2601.19897) averages its teacher in the same way. The average begins as the student is when the training
begins. It is taken in fp32, whatever the adapter's dtype, and is the same on all ranks, as the student's weights are.
A step that was left out counts as one, with the weights as they were: the average is a function of the step's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from gkd.models.zero import gathered
from gkd.teachers.shared import SharedTeacher


class AverageTeacher(SharedTeacher):
    """Scores with the student's base and the average of what the student trains.

    Args:
        model: of `gkd.models.shared_weights.with_own_adapter`.
        student: the unwrapped student.
        accelerator: where it trains.
        decay: from 0 (the student as it is) to below 1.
    """

    follows = True

    def __init__(self, model: Any, student: nn.Module, accelerator: Accelerator, decay: float) -> None:
        self._trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        super().__init__(model, accelerator)
        self._update = get_ema_multi_avg_fn(decay)
        own = dict(self.model.named_parameters())
        self._own = {name: own[name] for name in self._trained}
        self._average = {name: tensor.detach().float() for name, tensor in self._own.items()}
        self.callbacks = [FollowStudent(self)]

    @torch.no_grad()
    def follow(self, *, whole: bool = False) -> None:
        """Take the student's present weights in, `whole` in place of the average. A collective under ZeRO-3."""
        with gathered(self._trained.values()):
            present = [self._trained[name].to(average) for name, average in self._average.items()]
            if whole:
                self._set(dict(zip(self._average, present, strict=True)))
                return
            averages: Any = list(self._average.values())
            self._update(averages, present, 0)
        self._set(self._average)

    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, average in self._average.items():
            average.copy_(values[name])
            self._own[name].copy_(average)

    def state(self) -> Mapping[str, Tensor]:
        return self._average

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self._average.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in state.items()}:
            raise ValueError("it is the average of other weights than the student trains")
        self._set(state)

    def identity(self) -> str:
        return "the student's moving average"


class FollowStudent(TrainerCallback):
    """The average follows the student, step by step, before the step is saved."""

    def __init__(self, teacher: AverageTeacher) -> None:
        self.teacher = teacher

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # else its checkpoint has been read
            self.teacher.follow(whole=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.teacher.follow()
