"""The tokens that end a turn where the student's template and the teacher's own do not end it alike: one pair.

A base student ends its answers with `<|endoftext|>`, say, and an instruct teacher with `<|im_end|>`. Where the teacher
reads and writes in its own form, each stands for the other.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from gkd.data.vocabulary import end_of_turn

logger = logging.getLogger(__name__)

FIELD = "teacher_end_of_turn"
_REMEDY = f"say which by {FIELD}='STUDENT=TEACHER', two tokens (the same token twice where both end alike)"


def find_end_map(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_stops: Collection[int] = (),
    teacher_stops: Collection[int] = (),
    said: str | None = None,
) -> tuple[int, int] | None:
    """The id that ends a turn for the student, and the one that does for the teacher; None where it is the same.

    Args:
        student, teacher: the tokenizers, whose token maps are the same.
        student_stops, teacher_stops: at which each model stops beside what its tokenizer says
            (`gkd.data.vocabulary.configured_stop_ids`).
        said: the user's word for it, STUDENT=TEACHER.

    Raises:
        ValueError: it would be a guess; or what the user says are no two tokens, or ends no turn.
    """
    found = end_pair(student, teacher, student_stops, teacher_stops, said)
    if found[0] == found[1]:
        return None
    logger.info(
        "the student ends a turn with %s and the teacher with %s: for the teacher each stands in the place of the "
        "other, in what it reads, in what it writes and in what it says of the next token",
        *(f"{i} ({who.convert_ids_to_tokens(i)})" for i, who in zip(found, (student, teacher), strict=True)),
    )
    return found


def end_pair(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_stops: Collection[int] = (),
    teacher_stops: Collection[int] = (),
    said: str | None = None,
) -> tuple[int, int]:
    """The id that ends a turn in the student's vocabulary, and in the teacher's, which may be another one.

    Arguments and errors are those of `find_end_map`.
    """
    if said is None:
        return _end("student", student, student_stops), _end("teacher", teacher, teacher_stops)
    found = _tokens_of(said, student, teacher)
    _check_stops(said, found[0], student, student_stops)
    return found


def check_end_map(end_map: tuple[int, int] | None, compared: int) -> None:
    """Raises ValueError for a pair that not both models have a row for: only `compared` ids are compared."""
    if end_map is not None and max(end_map) >= compared:
        raise ValueError(
            f"the ids {end_map[0]} and {end_map[1]}, which end the turns of student and teacher "
            f"(teacher_template='own'), cannot stand for each other: only {compared:,} ids are compared. Take "
            "a student whose output head has a row for both, or teacher_template='student'"
        )


def templates_end(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int] = ()) -> int | None:
    """The id that ends an answer in the tokenizer's chat template, or behind it where the model stops at it; None
    where there is neither."""
    turn = end_of_turn(tokenizer, stop_ids)
    if turn is None or turn.token_id is not None:
        return None if turn is None else turn.token_id
    return int(turn.next_token_id) if turn.next_token_id in _stops(tokenizer, stop_ids) else None


def _end(who: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> int:
    """The id that ends the answers of this side."""
    known = templates_end(tokenizer, stop_ids)
    if known is not None:
        return known
    stops = _stops(tokenizer, stop_ids)
    if len(stops) == 1:
        return stops.pop()
    turn = end_of_turn(tokenizer, stop_ids)
    why = "has no chat template" if turn is None else "has a chat template that writes no token behind an answer"
    among = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)})" for i in sorted(stops)) or "none"
    raise ValueError(
        f"the {who}'s tokenizer {why}, and which of its stop tokens ends one ({among}) would be a guess: {_REMEDY}"
    )


def _stops(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> set[int]:
    return {int(i) for i in (*stop_ids, tokenizer.eos_token_id) if i is not None}


def _tokens_of(said: str, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Two tokens with a = between; there may be one in a token's own name, too."""
    known = student.get_vocab(), teacher.get_vocab()
    for place, letter in enumerate(said):
        names = said[:place].strip(), said[place + 1 :].strip()
        if letter == "=" and names[0] in known[0] and names[1] in known[1]:
            return known[0][names[0]], known[1][names[1]]
    raise ValueError(
        f"{FIELD}={said!r} does not name two tokens: write the one that ends the student's turns, =, and the one that "
        "ends the teacher's, as their tokenizers spell them (<|endoftext|>=<|im_end|>, say)"
    )


def _check_stops(said: str, end: int, student: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> None:
    turn = end_of_turn(student, stop_ids)
    stops = _stops(student, stop_ids) | ({turn.token_id} if turn and turn.token_id is not None else set())
    if end not in stops:
        named = ", ".join(str(student.convert_ids_to_tokens(i)) for i in sorted(stops))
        raise ValueError(
            f"{FIELD}={said!r} has no effect: the student never ends a turn with "
            f"{student.convert_ids_to_tokens(end)}, it stops at {named}"
        )
