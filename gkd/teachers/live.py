"""The student as it is at present as its own teacher (`self_teacher="live"`).

Its weights are the student's, one copy of them; it has modules of its own, in eval mode and without dropout, and no
gradient goes through what it says. What teaches is the prompt that it reads in place of the student's: without one the
two are one model, and the divergence is 0.
"""

from __future__ import annotations

from typing import Any

from gkd.teachers.shared import SharedTeacher


class LiveTeacher(SharedTeacher):
    """Scores with a second model over the student's parameters (`gkd.models.shared_weights.same_model`), which go on
    being trained."""

    follows = True

    def _made_ready(self, model: Any) -> Any:
        return model.eval()

    def identity(self) -> str:
        return "the student, at its present weights"
