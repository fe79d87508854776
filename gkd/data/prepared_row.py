"""One row of a data set: read, put into ids for student and teacher, and held to the limits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Features

from gkd._version import __version__
from gkd.common.text import printable
from gkd.data.encoded import Answers, Encoded, Limits
from gkd.data.formats import ChatRow, Row, TextRow, canonical_row
from gkd.data.kinds import Transform
from gkd.data.row_report import DROPPED, MIXED_FROM, NOTES_OF_THE_ANSWER, OF_THE_ANSWER, UNREAD, VIEW
from gkd.data.row_values import RowPlace, without_arrow_nulls
from gkd.data.targets import IGNORE
from gkd.data.teacher_rows import COLUMNS, Raw, TeacherReading, TeacherRows
from gkd.data.templates import STUMBLES_OF_ROWS
from gkd.data.unread import refuse_other_than_text, unread

PREPARED = {"input_ids", "labels", "prompt_length", "row"}  # columns that say that rows have been prepared


@dataclass(frozen=True)
class Preparation:
    """What becomes of rows, beside the tokenizer; see `gkd.data.prepare.prepare_dataset`."""

    name: str
    limits: Limits
    answers: Answers = field(default_factory=Answers)
    prompt_only_ok: bool = False
    prompts_needed: bool = True
    formatting_func: Callable[[dict[str, Any]], Any] | None = None
    teachers: tuple[str, ...] = ()
    features: Features | None = None  # of the data set as it is stored; None: not known
    transform: Transform | None = None
    stop_ids: tuple[int, ...] = ()
    today: str | None = None
    reading: TeacherReading = field(default_factory=TeacherReading)
    version: str = __version__  # only there for the key of `datasets.map`'s cache: another one may tokenize otherwise


@dataclass(frozen=True)
class ReadRow:
    """A row of a known format, before it is in ids.

    Attributes:
        place: where it stands.
        row: as the student reads it.
        read: as its teacher does, where that may differ.
        ignored: notes of what nothing reads.
        teacher: number of the teacher that scores it, of several.
    """

    place: RowPlace
    row: Row
    read: Row | None
    ignored: tuple[str, ...] = ()
    teacher: int = 0


def read_row(
    raw: Mapping[str, Any], place: RowPlace, readers: TeacherRows, preparation: Preparation, teacher: int = 0
) -> ReadRow:
    """One row of any format.

    Args:
        raw: its columns.
        place: where it stands.
        readers: the student's encoder, and how its teachers read rows.
        preparation: everything else.
        teacher: number of the teacher that scores it, of several.

    Raises:
        ValueError: it cannot be used; with row and column.
    """
    template, given = readers.student.tokenizer.chat_template, _given(raw, place, preparation)
    refuse_other_than_text(given.row, place)
    row = canonical_row(given.row, place, bool(template), given.exact)
    if preparation.prompts_needed and isinstance(row, TextRow) and not row.prompt:
        place.bad(
            "text",
            "running text has no prompt to continue: give rows a `prompt` and a `completion` (a formatting_func "
            "may return such a row, as a dict), or train on the data only with lmbda=0",
        )
    if isinstance(row, ChatRow) and not preparation.prompt_only_ok and preparation.answers.unanswered_rows == "cut":
        row = row.up_to_last_answer()
    read = readers.row(given, row, place, teacher)
    honoured = (
        MIXED_FROM,
        *(() if preparation.reading.view else COLUMNS),
        *(("teacher",) if preparation.teachers else ()),
    )
    ignored = [UNREAD + name for name in unread(given.row, row, str(template or ""), honoured, read)]
    return ReadRow(place, row, read, tuple(ignored), teacher)


def prepared_row(found: ReadRow, readers: TeacherRows, preparation: Preparation) -> Encoded:
    """One row in ids, within the limits, with notes of all that became of it.

    Raises:
        ValueError: it cannot be used; with row and column.
    """
    encoder, row, place = readers.student, found.row, found.place
    with _stumbles_named(place):
        encoded = readers.encoded(encoder.encode(row, place), row, found.read, place, found.teacher)
    if preparation.prompts_needed and encoded.prompt_length == 0:
        place.bad("input_ids", "has no prompt: its first id is a target already")
    view = (VIEW,) if encoded.has_view else ()
    notes = (*row.notes, *encoded.notes, *found.ignored, *view)
    return _fitted(encoded if notes == encoded.notes else replace(encoded, notes=notes), encoder.bos, preparation)


def _given(raw: Mapping[str, Any], place: RowPlace, preparation: Preparation) -> Raw:
    """The row's columns without Arrow's nulls, and what the user's function makes of them."""
    stored = raw
    exact: Collection[str] = ()
    if preparation.features is not None:
        stored = {column: without_arrow_nulls(value, preparation.features[column]) for column, value in raw.items()}
        exact = stored.keys()
    row = stored
    if preparation.formatting_func is not None:
        row, exact = _formatted(preparation.formatting_func(dict(raw)), place), ()
    return Raw(row, stored, exact, prepared=raw.keys() >= PREPARED)


def _fitted(row: Encoded, bos: int | None, preparation: Preparation) -> Encoded:
    """The row within the limits; a prompt where only its answer is at fault and none is needed."""
    if not preparation.prompt_only_ok and row.prompt_only and not DROPPED.keys() & set(row.notes):
        dropped = preparation.answers.unanswered_rows == "drop"
        return row.noted("unanswered") if dropped else preparation.limits.fit(row, bos)
    fitted = row if DROPPED.keys() & set(row.notes) else preparation.limits.fit(row, bos)
    if preparation.prompt_only_ok and OF_THE_ANSWER & set(fitted.notes):
        notes = tuple(note for note in row.notes if note not in OF_THE_ANSWER | NOTES_OF_THE_ANSWER)
        prompt = Encoded(row.prompt, [IGNORE] * len(row.prompt), len(row.prompt), notes)
        if row.has_view:
            prompt = prompt.read_by_teacher(row.teacher_prompt, row.teacher_prompt)
        return preparation.limits.fit(prompt, bos)
    return fitted


@contextmanager
def _stumbles_named(place: RowPlace) -> Iterator[None]:
    """Where a tokenizer or its chat template stumbles over a row, the row is named."""
    try:
        yield
    except STUMBLES_OF_ROWS as error:
        if str(error).startswith(str(place)):  # it is ours, and says where
            raise
        what = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ValueError(f"{place}: cannot be tokenized ({what})") from error


def _formatted(result: Any, place: RowPlace) -> Mapping[str, Any]:
    if isinstance(result, str):
        return {"text": result}
    if isinstance(result, Mapping):
        return result
    raise ValueError(
        f"formatting_func returned {type(result).__name__} for row {place.number} of the {place.dataset} data set; it "
        f"should return a row of a known format (a dict such as {{'prompt': ..., 'completion': ...}}) or one text"
    )
