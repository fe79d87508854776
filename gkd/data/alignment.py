"""Two tokenizers' ids of one completion, side by side: groups of tokens that stand for the same bytes.

A group ends where both have a border, so that it is the shortest stretch that both write in whole tokens:

    student  | The| cat| sat|12|3|.|
    teacher  | The| c|at| sat|1|23|.|
    groups   |  1-1 | 1-2 |1-1|2-2 |1-1|

These are the chunks of approximate likelihood matching (arXiv 2503.20083); TRL's GOLD finds them by text. Where both
write the same bytes this is arithmetic on cumulative lengths. Where they do not, the differing stretch alone is in
groups that are not compared: a character that one side has no token for, an accent that one tokenizer joins with its
letter, an end in the middle of a character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Tokens without text, as bytes that no text has; never the same on both sides.
_NO_TEXT = {"student": b"\xff", "teacher": b"\xfe"}
# A pair of special tokens; a run of what is no character (bytes, as surrogates, or U+FFFD); a character for a reader.
_CHARACTER = regex.compile(r"\uDCFF<\d+=\d+>|(?:(?!\uDCFF<\d+=\d+>)[\uDC80-\uDCFF\uFFFD])+|\X")
_UNREADABLE = regex.compile(r"[\uDC80-\uDCFF\uFFFD]+")
_SYNC, _REACH = 4, 24  # characters that must agree behind a difference, and how far ahead they are looked for


class Group(NamedTuple):
    """Tokens first..last (included) of student and teacher, as indices in the completion, that are the same bytes.

    Without a teacher side (`teacher_last = teacher_first - 1`) the student's tokens are not compared.
    """

    student_first: int
    student_last: int
    teacher_first: int
    teacher_last: int

    @property
    def compared(self) -> bool:
        return self.teacher_last >= self.teacher_first

    @property
    def num_student(self) -> int:
        return self.student_last - self.student_first + 1

    @property
    def num_teacher(self) -> int:
        return self.teacher_last - self.teacher_first + 1


def special_bytes(student_id: int, teacher_id: int) -> bytes:
    """What stands for a pair of special tokens on both sides in `align`: bytes that no text has."""
    return b"\xff<%d=%d>" % (student_id, teacher_id)


def align(student: Sequence[bytes | None], teacher: Sequence[bytes | None]) -> list[Group]:
    """The groups, in order: every token of the student's is in one, none is in two.

    A blank that one side alone has at the very beginning belongs to no text: SentencePiece puts one there.

    Args:
        student, teacher: the bytes of each token (`gkd.data.token_bytes`). None is a token without text (a beginning
            of text, an <unk>): the student's is not compared, the teacher's is in no group. A pair of special tokens
            that stand for each other is `special_bytes` on both sides.
    """
    ours = [_NO_TEXT["student"] if piece is None else piece for piece in student]
    theirs = [_NO_TEXT["teacher"] if piece is None else piece for piece in teacher]
    texts = b"".join(ours), b"".join(theirs)
    if texts[0] != texts[1] and _leave_out_a_blank(ours, theirs):
        texts = b"".join(ours), b"".join(theirs)
    blocks = [(0, 0, len(texts[0]))] if texts[0] == texts[1] else _equal_blocks(*texts)
    return _groups(_ends(ours), _ends(theirs), blocks)


def _leave_out_a_blank(ours: list[bytes], theirs: list[bytes]) -> bool:
    """Whether one side begins as the other does, behind one more blank: which it then no longer has."""
    # A token without text in front is a beginning of text: a blank may follow it.
    firsts = [
        next((i for i, piece in enumerate(side) if piece not in (b"", *_NO_TEXT.values())), None)
        for side in (ours, theirs)
    ]
    if firsts[0] is None or firsts[1] is None:
        return False
    texts = b"".join(ours[firsts[0] :]), b"".join(theirs[firsts[1] :])
    more = (len(texts[0]) - len(texts[0].lstrip(b" "))) - (len(texts[1]) - len(texts[1].lstrip(b" ")))
    starts = [text.lstrip(b" ")[:_SYNC] for text in texts]
    if abs(more) != 1 or starts[0] != starts[1]:
        return False
    side, first = (ours, firsts[0]) if more > 0 else (theirs, firsts[1])
    side[first] = side[first][1:]
    return True


def _ends(pieces: Sequence[bytes]) -> Ints:
    """Where each token ends, in bytes."""
    return np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))


def _groups(student: Ints, teacher: Ints, blocks: Sequence[tuple[int, int, int]]) -> list[Group]:
    """Groups from the ends of tokens, in bytes, and the blocks (student's byte, teacher's, length) of equal bytes."""
    # Token counts at the borders that both have; from one border of a block to the next of it is compared.
    counts: list[Ints] = [np.zeros((1, 3), np.int64)]
    for number, (at, other, length) in enumerate(blocks, 1):
        ours = _ends_within(student, at, length)
        theirs = _ends_within(teacher, other, length)
        both = np.flatnonzero(ours & theirs)
        tokens = _tokens_up_to(student, both + at), _tokens_up_to(teacher, both + other)
        counts.append(np.stack([*tokens, np.full(len(both), number)], axis=1))
    counts.append(np.array([[len(student), len(teacher), 0]], np.int64))
    table = np.concatenate(counts)
    before, after = table[:-1], table[1:]
    compared = (before[:, 2] == after[:, 2]) & (after[:, 2] > 0)
    last_teacher = np.where(compared, after[:, 1], before[:, 1]) - 1
    rows = np.stack([before[:, 0], after[:, 0] - 1, before[:, 1], last_teacher], axis=1)
    return [Group(*row) for row in rows[after[:, 0] > before[:, 0]].tolist()]


def _ends_within(ends: Ints, start: int, length: int) -> NDArray[np.bool_]:
    """Whether there is a border at each of the bytes start..start + length."""
    found = np.zeros(length + 1, bool)
    found[0] = start == 0
    first, last = np.searchsorted(ends, (start, start + length + 1))
    found[ends[first:last] - start] = True
    return found


def _tokens_up_to(ends: Ints, borders: Ints) -> Ints:
    """How many tokens stand before each border; one without bytes belongs to what follows it."""
    return np.where(borders > 0, np.searchsorted(ends, borders) + 1, 0)


def _equal_blocks(student: bytes, teacher: bytes) -> list[tuple[int, int, int]]:
    """Stretches of equal bytes of two writings of one text: (byte of the student's, of the teacher's, length).

    A character that they spell differently has one of length 0 at either end, where a group may end.
    """
    ours, theirs = _characters(student), _characters(teacher)
    raw = [[character.encode("utf-8", "surrogateescape") for character in side] for side in (ours, theirs)]
    starts = [[0, *accumulate(map(len, side))] for side in raw]
    blocks = [(0, 0, 0)]
    for i, j in _same_characters(ours, theirs):
        here, behind = (starts[0][i], starts[1][j]), (starts[0][i + 1], starts[1][j + 1])
        same = raw[0][i] == raw[1][j]
        for at, other, length in [(*here, len(raw[0][i]))] if same else [(*here, 0), (*behind, 0)]:
            first, beside, before = blocks[-1]
            if (at, other) == (first + before, beside + before):
                blocks[-1] = (first, beside, before + length)
            else:
                blocks.append((at, other, length))
    return blocks


def _characters(text: bytes) -> list[str]:
    found: list[str] = _CHARACTER.findall(text.decode("utf-8", "surrogateescape"))
    return found


def _name(character: str) -> str:
    """The same for all spellings of a character; "" for what is none."""
    return "" if _UNREADABLE.fullmatch(character) else unicodedata.normalize("NFC", character)


def _same_characters(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """Which character of one writing is which of the other, in order; what cannot be told is left out."""
    a, b = [_name(character) for character in ours], [_name(character) for character in theirs]
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            pairs.append((i, j))
            step: tuple[int, int] | None = (1, 1)
        elif a[i] == "":
            step = _behind_unreadable(a, i + 1, b, j, len(ours[i]))
        elif b[j] == "":
            step = _behind_unreadable(b, j + 1, a, i, len(theirs[j]))
            step = step and (step[1], step[0])
        else:
            step = _near_agreement(a, i, b, j)
        step = step or _far_agreement(a, i, b, j)
        if step is None:
            break
        i, j = i + step[0], j + step[1]
    return pairs


def _behind_unreadable(a: Sequence[str], i: int, b: Sequence[str], j: int, length: int) -> tuple[int, int] | None:
    """How far both go on where `a` has something unreadable in front of i: tokens without text, which are a letter of
    `b` each most often, or nothing."""
    letters = accumulate(map(len, b[j : j + length]))
    likely = 1 + sum(count < length for count in letters)
    return next(((1, step) for step in (likely, *range(length + 1)) if _agree(a, i, b, j + step)), None)


def _near_agreement(a: Sequence[str], i: int, b: Sequence[str], j: int) -> tuple[int, int] | None:
    """The shortest way from two characters that differ to where the next ones agree."""
    ways = ((left, both - left) for both in range(1, _REACH) for left in range(both + 1))
    return next((way for way in ways if _agree(a, i + way[0], b, j + way[1])), None)


def _far_agreement(a: Sequence[str], i: int, b: Sequence[str], j: int) -> tuple[int, int] | None:
    """The way to the next few readable characters of `a` that stand in `b`, however far, or else to the same end."""
    places: dict[tuple[str, ...], int] = {}
    for k in range(j, len(b) - _SYNC + 1):
        places.setdefault(tuple(b[k : k + _SYNC]), k)
    runs = ((k, tuple(a[k : k + _SYNC])) for k in range(i, len(a) - _SYNC + 1))
    for k, run in runs:
        if "" not in run and run in places:
            return k - i, places[run] - j
    same = 0
    while same < min(len(a) - i, len(b) - j) and a[-1 - same] == b[-1 - same] != "":
        same += 1
    return (len(a) - same - i, len(b) - same - j) if same else None


def _agree(a: Sequence[str], i: int, b: Sequence[str], j: int) -> bool:
    """Whether the next characters are the same, up to what is unreadable, or to the end."""
    ours, theirs = a[i : i + _SYNC], b[j : j + _SYNC]
    most = min([side.index("") for side in (ours, theirs) if "" in side], default=_SYNC)
    return most > 0 and bool(ours) and ours[:most] == theirs[:most]
