"""A batch as the teacher reads it, where that is not as the student does.

Student and teacher may have different prompts in front of one completion: a system turn that only the teacher sees, a
worked solution, a chat template of its own. Such a batch holds both (`gkd.data.sequences.collate`). A teacher knows
nothing of it: it is given its own view under the ordinary names. Target n is the same token of the same completion in
both, at another position.

B rows, T tokens, N targets.
"""

from __future__ import annotations

from torch import Tensor

TEACHER = "teacher_"  # what the names of the teacher's tensors begin with
_VIEW = ("input_ids", "attention_mask", "labels", "target_at", "target_ids", "target_rows", "target_places")
_OF_BOTH = ("sources", "rows", "teachers")  # [B]


def teacher_view(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch for `Teacher.score`: the very same where the teacher reads what the student reads."""
    if TEACHER + "input_ids" not in batch:
        return batch
    both = {name: batch[name] for name in _OF_BOTH if name in batch}
    return both | {name: batch[TEACHER + name] for name in _VIEW if TEACHER + name in batch}
