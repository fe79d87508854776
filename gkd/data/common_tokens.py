"""The tokens that two vocabularies spell alike: over these, two models can be compared in full.

That is what `strict` matching is in X-Token (arXiv 2605.21699) and the exact part of TRL's GOLD; spelled in bytes, so
that `Ġthe` and `▁the` are one, and with special tokens paired by what they do (the end of a turn) or by their text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gkd.data.token_bytes import is_byte_piece, token_bytes, unknown_id


@dataclass(frozen=True)
class CommonTokens:
    """Column k of both is one token: the student's id for it (ascending), and the teacher's. [S] each."""

    student: Tensor
    teacher: Tensor


def common_tokens(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_rows: int,
    teacher_rows: int,
    end_of_turn: tuple[int, int] | None = None,
) -> CommonTokens:
    """The ids that stand for the same bytes, each at most once, and those of special tokens.

    Where several ids of one side stand for the same bytes, the one that its tokenizer writes is taken: a piece rather
    than the byte of SentencePiece's fallback, then the first.

    Args:
        student, teacher: the tokenizers.
        student_rows, teacher_rows: rows of the output heads; ids behind the last are left out.
        end_of_turn: see `special_pairs`.
    """
    if student.get_vocab() == teacher.get_vocab():
        return _one_vocabulary(min(student_rows, teacher_rows), end_of_turn)
    theirs = _ids_by_bytes(teacher)
    pairs = {i: theirs[text] for text, i in _ids_by_bytes(student).items() if text in theirs}
    pairs |= special_pairs(student, teacher, end_of_turn)
    known = sorted((s, t) for s, t in pairs.items() if s < student_rows and t < teacher_rows)
    ids = torch.tensor(known, dtype=torch.long).reshape(-1, 2)
    return CommonTokens(ids[:, 0].contiguous(), ids[:, 1].contiguous())


def _one_vocabulary(rows: int, end_of_turn: tuple[int, int] | None) -> CommonTokens:
    """Every id is itself, padding rows too, but the two that end a turn, which stand for each other."""
    ids, theirs = torch.arange(rows), torch.arange(rows)
    if end_of_turn is not None and max(end_of_turn) < rows:
        theirs[list(end_of_turn)] = torch.tensor(end_of_turn).flip(0)
    return CommonTokens(ids, theirs)


def special_pairs(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, end_of_turn: tuple[int, int] | None = None
) -> dict[int, int]:
    """The teacher's id for each special token of the student that has one: the end of a turn, and the same texts.

    Args:
        end_of_turn: the id that ends a turn for the student, and for the teacher (`gkd.data.end_map.end_pair`), which
            may be spelled otherwise; neither then stands for anything else.
    """
    ours, theirs = _special(student), _special(teacher)
    pairs = {i: theirs[text] for text, i in ours.items() if text in theirs}
    if end_of_turn is not None:
        pairs = {s: t for s, t in pairs.items() if s != end_of_turn[0] and t != end_of_turn[1]}
        pairs[end_of_turn[0]] = end_of_turn[1]
    return pairs


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens by their text, but <unk>, which stands for other text in each."""
    unknown = unknown_id(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids: Iterable[int] = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    return {str(tokenizer.convert_ids_to_tokens(i)): i for i in sorted(ids) if i != unknown}


def _ids_by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    table = token_bytes(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(len(table))))
    order = sorted(range(len(table)), key=lambda i: (names[i] is not None and is_byte_piece(names[i]), i))
    ids: dict[bytes, int] = {}
    for i in order:
        text = table[i]
        if text:
            ids.setdefault(text, i)
    return ids
