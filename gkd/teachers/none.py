"""No teacher: what is trained on is the data's own text, and nothing is compared."""

from __future__ import annotations

from torch import Tensor

from gkd.loss.signals import TeacherSignal
from gkd.teachers.base import Teacher


class NoTeacher(Teacher):
    """Stands where a teacher would; whoever has a question does not ask it (`Teacher.missing`)."""

    writes_only = True
    missing = True

    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        raise AssertionError("there is no teacher to be asked")
