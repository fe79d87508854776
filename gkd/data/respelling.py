"""One completion in the ids of two tokenizers: rewritten from one's to the other's, and put side by side.

By way of its text, so that either model reads a completion in the tokens that it was trained on. Special tokens do not
pass through text: those that have a partner become it, the others are left out; text that merely looks like a special
token stays text, and an <unk> is read as U+FFFD, the sign for a character that nobody knows.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gkd.data.alignment import Group, align, special_bytes
from gkd.data.common_tokens import special_pairs
from gkd.data.token_bytes import spelled, token_bytes, unknown_id


@dataclass(frozen=True)
class _Side:
    """A tokenizer, the bytes of its ids, and whether it puts a blank in front of a text: of every one, or of one that
    has none."""

    tokenizer: PreTrainedTokenizerBase
    table: list[bytes | None]
    adds_blank: bool
    always: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Side:
        table = token_bytes(tokenizer)
        coded = [spelled(table, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("a", " a")]
        first, second = (b"".join(piece or b"" for piece in pieces) for pieces in coded)
        return cls(tokenizer, table, first.startswith(b" "), second.startswith(b"  "))

    def text(self, written: str) -> str:
        """What was read, where this tokenizer has written it."""
        added = self.adds_blank and (self.always or not written.startswith("  "))
        return written.removeprefix(" ") if added else written

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids


class Respelling:
    """Student's and teacher's ids of a completion.

    Args:
        student, teacher: the tokenizers.
        end_of_turn: the id that ends a turn for the student, and for the teacher (`gkd.data.end_map.end_pair`).

    Raises:
        ValueError: the tokens of one of them have no bytes (`gkd.data.token_bytes.token_bytes`).
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        end_of_turn: tuple[int, int] | None = None,
    ) -> None:
        self.student, self.teacher = _Side.of(student), _Side.of(teacher)
        self.special = special_pairs(student, teacher, end_of_turn)

    def for_teacher(self, ids: Sequence[int]) -> list[int]:
        """The teacher's ids for the student's completion."""
        return _rewritten(ids, self.student, self.teacher, self.special)

    def for_student(self, ids: Sequence[int]) -> list[int]:
        """The student's ids for the teacher's completion."""
        return _rewritten(ids, self.teacher, self.student, {t: s for s, t in self.special.items()})

    def groups(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> list[Group]:
        """Both, side by side (`gkd.data.alignment.align`)."""
        pairs = [(s, t, special_bytes(s, t)) for s, t in self.special.items()]
        ours, theirs = {s: text for s, _, text in pairs}, {t: text for _, t, text in pairs}
        return align(
            [
                ours.get(i, piece)
                for i, piece in zip(student_ids, spelled(self.student.table, student_ids), strict=True)
            ],
            [
                theirs.get(i, piece)
                for i, piece in zip(teacher_ids, spelled(self.teacher.table, teacher_ids), strict=True)
            ],
        )


def _rewritten(ids: Sequence[int], source: _Side, target: _Side, special: Mapping[int, int]) -> list[int]:
    """The target's ids for the source's; bytes of no character are read as U+FFFD, a cut one at the end is not."""
    made: list[int] = []
    pending: list[bytes] = []
    unknown = unknown_id(source.tokenizer)

    def write(last: bool) -> None:
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(pending), final=not last)
        pending.clear()
        made.extend(target.ids(text if made else source.text(text)))

    for i, piece in zip(ids, spelled(source.table, ids), strict=True):
        if piece is not None or i == unknown:
            pending.append(piece or "\ufffd".encode())
        elif i in special:
            write(last=False)
            made.append(special[i])
    write(last=True)
    return made
