"""What models are measured on, as student and teacher read it: one completion, behind the prompt of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gkd.data.sequences import EndMap, TokenSequence, join

Ids = list[int]


@dataclass(frozen=True)
class TeacherReads:
    """What the teacher reads where that is not what the student does.

    Attributes:
        prompts: one for each prompt of the evaluation; it answers these.
        contexts: one for each held-out answer; empty where these are texts without a prompt.
        end_map: the token that ends a turn for the student, and the one for the teacher, where they differ.
    """

    prompts: Sequence[Ids]
    contexts: Sequence[Ids] = ()
    end_map: EndMap | None = None

    def differs_from(self, prompts: Sequence[Ids]) -> bool:
        """Whether it is any matter, with these prompts of the student."""
        return self.end_map is not None or list(self.prompts) != list(prompts)


def answered(
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    teacher: TeacherReads | None,
    *,
    source: str,
    teachers: Sequence[int] = (),
) -> list[TokenSequence]:
    """Completions behind the student's prompts, and behind the teacher's in its view.

    Args:
        source: who wrote them, "student" or "teacher".
        teachers: number of each row's, of several.
    """
    read = prompts if teacher is None else teacher.prompts
    end_map = None if teacher is None else teacher.end_map
    return [
        join(prompt, completion, source, row, teacher=number, teacher_prompt=own, end_map=end_map)
        for row, (prompt, completion, own, number) in enumerate(
            zip(prompts, completions, read, teachers or [0] * len(prompts), strict=True)
        )
    ]


def held_out(
    texts: Sequence[Ids],
    starts: Sequence[int],
    teacher: TeacherReads | None,
    *,
    by_teacher: bool,
    teachers: Sequence[int] = (),
    respelled: bool = False,
) -> list[TokenSequence]:
    """Held-out texts with targets from `starts` on, as the student reads them or as the teacher does.

    Args:
        teachers: numbers of the texts', of several.
        respelled: the teacher puts them into its own tokens (`Subject.in_own_tokens`), texts from their beginning on.
    """
    read = teacher.contexts if teacher is not None and teacher.contexts else [()] * len(texts)
    end_map = teacher.end_map if teacher is not None and teacher.contexts else None
    rows = [
        join(ids[:start], ids[start:], "data", row, teacher=number, teacher_prompt=context, end_map=end_map)
        for row, (ids, start, context, number) in enumerate(
            zip(texts, starts, read, teachers or [0] * len(texts), strict=True)
        )
    ]
    if by_teacher and respelled:
        return rows if any(read) else [join([], list(ids), "data", row) for row, ids in enumerate(texts)]
    return [row.as_the_teacher_reads_it() for row in rows] if by_teacher else rows
