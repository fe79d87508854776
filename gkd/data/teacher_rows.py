"""A row as its teacher reads it, where that is not as the student does: another prompt, system turn or template.

| given by                        | what the teacher reads                                                           |
| ------------------------------- | -------------------------------------------------------------------------------- |
| column `teacher_prompt`         | it in the place of the prompt: turns, or a text (of a chat, its one user turn)    |
| column `teacher_system`         | it in the place of the system turn, or in front of a chat without one             |
| a function `teacher_view`       | the prompt of the row that it returns, of any format; the columns do not count    |
| a template of the teacher's own | the same turns, as its own tokenizer writes them                                  |

The completion is the student's, id for id. What stands in front of it for the teacher is kept as ids beside the row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd.data.encode import RowEncoder
from gkd.data.encoded import Encoded
from gkd.data.formats import ChatRow, Row, TextRow, canonical_row
from gkd.data.message_bytes import MessageBytes
from gkd.data.row_values import RowPlace, describe, is_empty
from gkd.data.targets import IGNORE
from gkd.data.token_rows import TokenRow
from gkd.data.turns import Message, chat_as_text, read_turns
from gkd.data.unread import refuse_other_than_text

View = Callable[[dict[str, Any]], Any]
COLUMNS = ("teacher_prompt", "teacher_system")
IDS = ("teacher_context", "teacher_prompt_ids")  # of prepared rows, see `gkd.data.prepare.prepare_dataset`


@dataclass(frozen=True)
class OwnTemplate:
    """What renders a teacher's prompts in its own form.

    Args:
        tokenizer: the teacher's, with its chat template; None for one behind a chat address, which reads messages.
        stop_ids: at which the teacher stops beside what its tokenizer says.
        end_map: the ids that end a turn of the student's and of the teacher's, where they differ.
        foreign: its ids stand for other tokens than the student's, so that it reads no completion in these.
    """

    tokenizer: PreTrainedTokenizerBase | None
    stop_ids: tuple[int, ...] = ()
    end_map: tuple[int, int] | None = None
    foreign: bool = False

    @property
    def writes_chats(self) -> bool:
        return self.tokenizer is None or bool(self.tokenizer.chat_template)


@dataclass(frozen=True)
class TeacherReading:
    """How teachers read rows, beside what columns say.

    Args:
        view: row -> the row that the teacher reads.
        own: the template of each teacher, by number; None, and none beyond the end, is the student's.
    """

    view: View | None = None
    own: tuple[OwnTemplate | None, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether any teacher may read something of its own, whatever the columns say."""
        return self.view is not None or any(self.own)

    @property
    def end_map(self) -> tuple[int, int] | None:
        """The ids that end a turn of the student's and of its teachers', where they differ."""
        found = {own.end_map for own in self.own if own is not None}
        assert len(found) < 2, "teachers that end their turns differently"
        return next(iter(found), None)

    @property
    def foreign(self) -> bool:
        """Whether its teachers have other tokens than the student."""
        return any(own is not None and own.foreign for own in self.own)

    def template(self, teacher: int) -> OwnTemplate | None:
        return self.own[teacher] if teacher < len(self.own) else None


@dataclass(frozen=True)
class Raw:
    """A row before it has a format.

    Attributes:
        row: its columns, after a `formatting_func`.
        stored: its columns as the data set has them.
        exact: columns whose None entries are the user's, not Arrow's.
        prepared: it is in ids already, by this package.
    """

    row: Mapping[str, Any]
    stored: Mapping[str, Any]
    exact: Collection[str] = ()
    prepared: bool = False


class TeacherRows:
    """Reads rows as their teachers do.

    Args:
        reading: how.
        encoder: the student's.
        today: what chat templates write as today's date.
    """

    def __init__(self, reading: TeacherReading, encoder: RowEncoder, today: str | None = None) -> None:
        self.reading, self.student, self._today = reading, encoder, today
        self._encoders: dict[int, RowEncoder | MessageBytes] = {}

    def row(self, raw: Raw, row: Row, place: RowPlace, teacher: int = 0) -> Row | None:
        """What becomes of a row for its teacher; None when nothing says that it differs from the student's `row`.

        Raises:
            ValueError: a value that cannot be read, with row and column.
        """
        if raw.prepared:
            return None
        own, view = self.reading.template(teacher), self.reading.view
        if view is not None:
            has_template = self.student.template is not None if own is None else own.writes_chats
            return _returned(view(copy.deepcopy(dict(raw.stored))), row, place, has_template, bool(raw.exact))
        known = row
        if own is not None and isinstance(row, TextRow):  # an instruction is a chat where there is a template
            known = canonical_row(raw.row, place, own.writes_chats, raw.exact)
        read = _of_columns(raw, known, place)
        if own is None:
            return None if read is row else read
        if isinstance(read, TokenRow) and (read.teacher_context or read.teacher_prompt_ids):
            return None
        if own.foreign and isinstance(read, TextRow):
            return read
        if not isinstance(read, ChatRow) and is_empty(raw.row.get("teacher_prompt")):
            kind = "token ids" if isinstance(read, TokenRow) else "plain text"
            remedy = "" if own.foreign else ", or leave teacher_template out"
            raise ValueError(
                f"{place} is {kind}, which has no turns that the teacher's own template could write "
                f"(teacher_template='own'): give it as a list of turns, or what the teacher reads in a column "
                f"teacher_prompt{remedy}"
            )
        return read

    def encoded(self, student: Encoded, row: Row, read: Row | None, place: RowPlace, teacher: int = 0) -> Encoded:
        """The student's row with what its teacher reads in front of the completion, and writes from.

        Args:
            student: the row in ids, before it is cut.
            row: what it was made of.
            read: what `row` gave.

        Raises:
            ValueError: a template cannot write it; earlier answers are trained on, or nothing is left of the prompt.
        """
        if read is not None:
            encoder, own = self._encoder(teacher), self.reading.template(teacher)
            there = replace(place, reader="as its teacher reads it")
            if own is not None and own.foreign:
                prompt = encoder.encode(read, there).prompt
                context = prompt
            else:
                end_map = own.end_map if own else None
                context, prompt = _front(encoder, student, _answered(read, row), there, end_map)
        elif isinstance(row, TokenRow) and (row.teacher_context or row.teacher_prompt_ids):
            self._encoder(teacher).check_ids(row.teacher_context, "teacher_context", place)
            self._encoder(teacher).check_ids(row.teacher_prompt_ids, "teacher_prompt_ids", place)
            context = list(row.teacher_context) or student.input_ids[: student.prompt_length]
            prompt = list(row.teacher_prompt_ids) or list(row.teacher_context) or student.prompt
        else:
            return student
        seen = student.read_by_teacher(context, prompt)
        if not seen.has_view:
            return student
        if not prompt or not context:
            place.bad("teacher_prompt", "leaves the teacher nothing to read in front of the answer")
        if any(label != IGNORE for label in student.labels[1 : student.prompt_length]):
            raise ValueError(
                f"{place} trains on answers before its last one, which have no place in a prompt of the teacher's "
                "own: set assistant_turns='last', give each answer a row of its own, or leave the teacher's view out"
            )
        if student.prompt_length == 0:  # its first id has nothing in front of it, so it is no target for anybody
            seen = replace(seen, labels=[IGNORE, *seen.labels[1:]])
        return seen

    def _encoder(self, teacher: int) -> RowEncoder | MessageBytes:
        own, student = self.reading.template(teacher), self.student
        if teacher not in self._encoders and own is not None and own.tokenizer is None:
            self._encoders[teacher] = MessageBytes()
        elif teacher not in self._encoders:
            tokenizer = student.tokenizer if own is None else own.tokenizer
            stop_ids = student.stop_ids if own is None else own.stop_ids
            self._encoders[teacher] = RowEncoder(tokenizer, "last", stop_ids, self._today)
        return self._encoders[teacher]


def _front(
    encoder: RowEncoder | MessageBytes, student: Encoded, read: Row, place: RowPlace, end_map: tuple[int, int] | None
) -> tuple[list[int], list[int]]:
    """What stands in front of the student's completion for the teacher, and what it writes from.

    The first is the teacher's own row without the completion, where that ends with it; else the second.
    """
    found = encoder.encode(read, place)
    prompt, completion = found.prompt, student.input_ids[student.prompt_length :]
    if not completion or student.prompt_only:
        return (student.input_ids[: student.prompt_length] if prompt == student.prompt else prompt), prompt
    ends = [completion]
    if end_map is not None and completion[-1] == end_map[0]:
        ends.append([*completion[:-1], end_map[1]])
    for end in ends if _answer(read) is not None else []:
        if found.input_ids[-len(end) :] == end:
            return found.input_ids[: -len(end)], prompt
    return prompt, prompt


def _answer(row: Row) -> Message | None:
    if isinstance(row, ChatRow):
        return None if row.answer is None else row.messages[row.answer]
    if isinstance(row, TextRow) and row.completion is not None:
        return {"role": "assistant", "content": row.completion}
    return None


def _answered(read: Row, row: Row) -> Row:
    """A prompt with the row's own answer behind it, so that it is rendered as the student's is."""
    answer = _answer(row)
    if answer is None or _answer(read) is not None:
        return read
    if isinstance(read, ChatRow) and isinstance(row, ChatRow):
        return replace(read, messages=[*read.messages, answer], answer=len(read.messages))
    if isinstance(read, TextRow) and isinstance(row, TextRow):
        return replace(read, completion=row.completion)
    return read


# ------------------------------------------------------------------------------------------------------ a function's


def _returned(made: Any, row: Row, place: RowPlace, has_template: bool, exact: bool) -> Row:
    """The row that a `teacher_view` has returned."""
    if not isinstance(made, Mapping):
        raise ValueError(
            f"teacher_view returned {describe(made)} for row {place.number} of the {place.dataset} data set; it "
            "should return a row of a known format (the row as it got it, where the teacher reads what the student "
            "does)"
        )
    there = replace(place, reader="as teacher_view returned it")
    refuse_other_than_text(made, there)
    read = canonical_row(made, there, has_template, made.keys() if exact else ())
    if isinstance(read, ChatRow) and isinstance(row, ChatRow) and "question_left_out" in row.notes:
        read = read.up_to_last_answer()
    answer, own = _answer(read), _answer(row)
    if answer is not None and (own is None or not _say_the_same(answer, own)):
        raise ValueError(
            f"{there}, has another answer than the row itself; a teacher's view is of the prompt, and both models "
            "read the same completion: return the row with its own answer, or the prompt alone"
        )
    return read


def _say_the_same(one: Message, other: Message) -> bool:
    return bool(one["content"].strip() == other["content"].strip())


# ----------------------------------------------------------------------------------------------------------- columns


def _of_columns(raw: Raw, row: Row, place: RowPlace) -> Row:
    """The row with what the columns say of its teacher; the same object when they say nothing."""
    prompt, system = (raw.row.get(name) for name in COLUMNS)
    if not is_empty(prompt):
        row = _with_prompt(row, prompt, place, "teacher_prompt" in raw.exact)
    if not is_empty(system):
        row = _with_system(row, system, place)
    return row


def _with_prompt(row: Row, prompt: Any, place: RowPlace, exact: bool) -> Row:
    if isinstance(prompt, str) and not chat_as_text(prompt):
        if isinstance(row, ChatRow):
            return _of_messages([{"role": "user", "content": prompt}], row)
        return TextRow(prompt, row.completion if isinstance(row, TextRow) else None)
    if not isinstance(prompt, (str, list, tuple)):
        place.bad("teacher_prompt", f"should be a text or a list of turns, got {describe(prompt)}")
    turns = read_turns(prompt, place, "teacher_prompt", exact)
    if turns[-1].role == "assistant":
        place.bad("teacher_prompt", "ends with an assistant turn; the answer is the row's own, so leave that turn out")
    return _of_messages([turn.message for turn in turns], row)


def _of_messages(prompt: list[Message], row: Row) -> ChatRow:
    """A chat with this prompt, and with the answer, the tools and the options of the row."""
    if not isinstance(row, ChatRow):
        return ChatRow(prompt, None)
    answer = [] if row.answer is None else [row.messages[row.answer]]
    return replace(row, messages=[*prompt, *answer], answer=len(prompt) if answer else None, untrained=frozenset())


def _with_system(row: Row, system: Any, place: RowPlace) -> ChatRow:
    if not isinstance(system, str):
        place.bad("teacher_system", f"should be text, got {describe(system)}")
    if not isinstance(row, ChatRow):
        kind = "token ids" if isinstance(row, TokenRow) else "plain text"
        place.bad("teacher_system", f"is for chats, and this row is {kind}: give all that it reads as teacher_prompt")
    first = row.messages[0]
    if first["role"] in ("system", "developer"):
        return replace(row, messages=[{**first, "content": system}, *row.messages[1:]])
    return replace(
        row,
        messages=[{"role": "system", "content": system}, *row.messages],
        answer=None if row.answer is None else row.answer + 1,
        untrained=frozenset(number + 1 for number in row.untrained),
    )
