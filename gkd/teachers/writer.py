"""A teacher that only writes: its tokens are not the student's, or it shows no probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gkd.loss.signals import TeacherSignal
from gkd.teachers.base import Teacher


class WriterTeacher(Teacher):
    """Refuses to score.

    Args:
        inner: the teacher in this process; None when it is elsewhere.
        name: of one that is elsewhere.
    """

    writes_only = True

    def __init__(self, inner: Teacher | None = None, name: str | None = None) -> None:
        self._inner, self._name = inner, name
        if inner is not None:
            self.model, self.callbacks, self.together = inner.model, inner.callbacks, inner.together

    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        """Raises ValueError: nothing is compared with it."""
        raise ValueError(
            "the teacher has another tokenizer than the student, or shows no probabilities, so there is no divergence "
            "to be evaluated: leave the evaluation during the training out (eval_strategy='no'); the student by "
            "itself is measured by gkd evaluate"
        )

    def each(self) -> Sequence[Teacher]:
        return [self] if self._inner is None or len(self._inner.each()) == 1 else self._inner.each()

    def models(self) -> list[Callable[[], Any]]:
        return super().models() if self._inner is None else self._inner.models()

    def repo(self, kwargs: Any = None) -> tuple[str | None, str | None]:
        return (self._name, None) if self._inner is None else self._inner.repo(kwargs)

    def identity(self) -> str | None:
        return self._name if self._inner is None else self._inner.identity()
