"""The one method of a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from gkd.loss.signals import TeacherSignal


class Teacher(Protocol):
    """Says what the teacher thinks of the N targets of a micro-batch."""

    @property
    def model(self) -> Any:
        """The frozen model in this process; None when it is elsewhere, or there is not one."""
        ...

    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        """`input_ids`, `attention_mask`, `labels` [B, T] -> a signal for the N targets, in row-major order."""
        ...

    def head_parameters(self) -> Iterable[Tensor | None]:
        """Parameters that the signal refers to and that ZeRO-3 may have sharded."""
        ...
