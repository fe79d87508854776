"""Tokens that only one of two vocabularies has, each counted with the common token that its text begins with.

Where a student writes "12" and its teacher "1", "2", the teacher's "1" is any text that begins with 1: so is the
student's "1" once its "12" counts with it (`gkd.loss.aligned`). Which common token that is, the other tokenizer's own
spelling of the text says. Tokens that are no whole characters, and special ones, have none and count with the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gkd.data.common_tokens import CommonTokens
from gkd.data.token_bytes import token_bytes

# In front of a text, so that a tokenizer that puts a blank before the first word puts it here.
_BEFORE = "\n"


def joined_tokens(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    common: CommonTokens,
    student_rows: int,
    teacher_rows: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Of the student's tokens and of the teacher's, [2, F] each: ids, and the column of `common` each counts with.

    Args:
        student, teacher: the tokenizers.
        common: what they have in common (`gkd.data.common_tokens.common_tokens`).
        student_rows, teacher_rows: rows of the output heads; ids behind the last are left out.

    Returns:
        None for a side without such tokens.
    """
    if student.get_vocab() == teacher.get_vocab():
        return None, None
    return (
        _joined(student, teacher, common.student, common.teacher, student_rows),
        _joined(teacher, student, common.teacher, common.student, teacher_rows),
    )


def _joined(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, known: Tensor, others: Tensor, rows: int
) -> Tensor | None:
    columns = {i: column for column, i in enumerate(others.tolist())}
    table, spelling, common = token_bytes(one), token_bytes(other), set(known.tolist())
    alone = [i for i, text in enumerate(table[:rows]) if text and i not in common]
    texts = [_text(table[i]) for i in alone]
    firsts = _first_tokens(other, [text for text in texts if text is not None])
    found = []
    for i, text in zip(alone, texts, strict=True):
        first = None if text is None else next(firsts)
        piece = None if first is None else spelling[first]
        if first in columns and piece and (table[i] or b"").startswith(piece):
            found.append((i, columns[first]))
    return torch.tensor(found, dtype=torch.long).T.contiguous() if found else None


def _text(piece: bytes | None) -> str | None:
    try:
        return None if piece is None else piece.decode()
    except UnicodeDecodeError:
        return None


def _first_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[int | None]:
    """The id that this tokenizer writes first for each text, in the midst of another; None where it joins the two."""
    before: list[int] = tokenizer(_BEFORE, add_special_tokens=False)["input_ids"]
    start = len(before)
    if not texts:
        return
    written = tokenizer([_BEFORE + text for text in texts], add_special_tokens=False, split_special_tokens=True)
    for ids in written["input_ids"]:
        yield ids[start] if ids[:start] == before and len(ids) > start else None
