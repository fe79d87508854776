"""A batch as a teacher with another tokenizer reads it: its own ids of the same completions, and where both meet.

Beside the student's tensors stand those of the teacher's view under the names of `gkd.data.teacher_view`, with M
targets of its own, and the groups of `gkd.data.alignment` in the numbers of the batch. A group counts when all of its
tokens are predicted on both sides, and are trained on.

A completion that the teacher has written is read by it in the ids that it wrote; any other is put into its ids by way
of the text (`gkd.data.respelling`).

N targets of the student, M of the teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gkd.data.alignment import Group
from gkd.data.common_tokens import CommonTokens
from gkd.data.respelling import Respelling
from gkd.data.sequences import TokenSequence, collate
from gkd.data.targets import IGNORE

logger = logging.getLogger(__name__)

BORDER, GROUP, TEACHER_GROUP = "aligned_border", "aligned_group", "aligned_teacher_group"


@dataclass(frozen=True)
class Alignment:
    """How a teacher with another tokenizer is compared.

    Attributes:
        respelling: puts both side by side.
        common: what both can say. student_joined, teacher_joined: what counts with it
            (`gkd.data.joined_tokens.joined_tokens`).
        end_of_turn: the id that ends a turn for the student, and for the teacher.
        pad_id: an id that the teacher can read.
        room: most tokens that the teacher can read; None is any number. What stands behind is not compared.
        size: ids of the teacher's vocabulary.
    """

    respelling: Respelling
    common: CommonTokens
    end_of_turn: tuple[int, int]
    student_joined: Tensor | None = None
    teacher_joined: Tensor | None = None
    pad_id: int = 0
    room: int | None = None
    size: int | None = None

    def vocabularies(self, device: torch.device) -> dict[str, Any]:
        """What an `AlignedSignal` holds of it, by its names there."""
        found = {
            "student_ids": self.common.student,
            "teacher_ids": self.common.teacher,
            "student_joined": self.student_joined,
            "teacher_joined": self.teacher_joined,
        }
        there = {name: None if ids is None else ids.to(device) for name, ids in found.items()}
        return {**there, "size": self.size}

    def respelled(self, sequence: TokenSequence) -> list[int]:
        """The completion in the teacher's ids."""
        if not sequence.teacher_ids:
            return self.respelling.for_teacher(sequence.input_ids[sequence.prompt_length :])
        if sequence.input_ids[-1] == self.end_of_turn[0] != sequence.teacher_ids[-1] != self.end_of_turn[1]:
            return [*sequence.teacher_ids[:-1], self.end_of_turn[1]]  # it ended with another of its stop tokens
        return sequence.teacher_ids

    def as_read(self, sequence: TokenSequence) -> tuple[list[int], list[int]]:
        """What the teacher reads in front of the completion, and the completion, up to where it can read. A text
        without a prompt begins as its tokenizer begins texts."""
        ids = self.respelled(sequence)
        context = sequence.teacher_context or sequence.input_ids[: sequence.prompt_length]
        tokenizer = self.respelling.teacher.tokenizer
        begin = [tokenizer.bos_token_id]
        if not context and begin != ids[:1] and tokenizer("")["input_ids"] == begin:
            context = begin
        if self.room is not None and len(context) + len(ids) > self.room:
            _warn_of_room(self.room)
            return context[: self.room], ids[: max(0, self.room - len(context))]
        return context, ids


@cache
def _warn_of_room(room: int) -> None:
    logger.warning(
        "in its own tokens some of what the teacher reads is longer than its %d positions (max_position_embeddings, "
        "or its server's --max-model-len): what stands behind is not compared; lower max_length and max_new_tokens, "
        "or take a teacher for longer texts",
        room,
    )


def respell(sequences: Sequence[TokenSequence], alignment: Alignment) -> None:
    """Put the completions that are trained on into the teacher's ids, where they stand in the sequences."""
    for sequence in sequences:
        if sequence.num_targets:
            sequence.teacher_ids = alignment.respelled(sequence)


def collate_aligned(
    sequences: Sequence[TokenSequence], alignment: Alignment, pad_id: int, multiple: int | None = None
) -> dict[str, Tensor]:
    """What `gkd.data.sequences.collate` gives, with the teacher's own rows as its view.

    Returns:
        Beside it `aligned_border` [N] (the teacher's target with which a group begins; -1 for all but its first
        token), `aligned_group` [N] and `aligned_teacher_group` [M] (number of the group; -1 without one), int64.
    """
    own = [replace(s, teacher_context=[], teacher_prompt_ids=[], teacher_last=None) for s in sequences]
    batch = collate(own, pad_id, multiple)
    rows: list[TokenSequence] = []
    border: list[int] = []
    group: list[int] = []
    teacher_group: list[int] = []
    number = 0
    for sequence in sequences:
        read, groups = as_the_teacher_reads_it(sequence, alignment)
        rows.append(read)
        found: dict[int, tuple[int, int]] = {}  # place in the completion -> group, teacher's target it begins with
        for one in groups:
            found |= dict.fromkeys(range(one.student_first, one.student_last + 1), (number, -1))
            found[one.student_first] = (number, len(teacher_group))
            teacher_group += [number] * one.num_teacher
            number += 1
        places = (p - sequence.prompt_length for p in _targets(sequence))
        own_groups = [found.get(place, (-1, -1)) for place in places]
        group += [which for which, _ in own_groups]
        border += [at for _, at in own_groups]
    view = collate(rows, alignment.pad_id, multiple)
    shown = ("input_ids", "attention_mask", "labels", "target_at", "target_ids", "target_rows", "target_places")
    batch |= {f"teacher_{name}": view[name] for name in shown}
    return batch | {
        BORDER: torch.tensor(border, dtype=torch.long),
        GROUP: torch.tensor(group, dtype=torch.long),
        TEACHER_GROUP: torch.tensor(teacher_group, dtype=torch.long),
    }


def as_the_teacher_reads_it(sequence: TokenSequence, alignment: Alignment) -> tuple[TokenSequence, list[Group]]:
    """The teacher's row, whose targets are the tokens of the groups that count, and these groups in order."""
    trained = {place - sequence.prompt_length for place in _targets(sequence)}
    if not trained:  # nobody asks what it says of such a row, whose ids it may not even have
        return _row(sequence, [alignment.pad_id], [IGNORE], 1), []
    context, ids = alignment.as_read(sequence)
    groups = [
        one
        for one in alignment.respelling.groups(sequence.input_ids[sequence.prompt_length :], ids)
        if one.compared
        and all(place in trained for place in range(one.student_first, one.student_last + 1))
        and (context or one.teacher_first > 0)
    ]
    labels = [IGNORE] * (len(context) + len(ids))
    for one in groups:
        for place in range(one.teacher_first, one.teacher_last + 1):
            labels[len(context) + place] = ids[place]
    return _row(sequence, [*context, *ids], labels, len(context)), groups


def _row(sequence: TokenSequence, ids: list[int], labels: list[int], start: int) -> TokenSequence:
    return TokenSequence(ids, labels, start, sequence.source, sequence.row, teacher=sequence.teacher)


def _targets(sequence: TokenSequence) -> list[int]:
    """Where its targets stand, as `collate` orders them."""
    return [place for place, label in enumerate(sequence.labels) if place and label != IGNORE]
