"""A look at the rows that `gkd new` is given: their format, what a recipe renames, what it would leave unused."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from gkd.common.text import printable
from gkd.data.formats import ChatRow, Row, TextRow, canonical_row
from gkd.data.row_values import RowPlace, describe
from gkd.data.token_rows import TokenRow
from gkd.data.unread import unread

# Column names that data sets use for a question and its answer, besides the formats of gkd.data.formats.
PAIRS = (
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "chosen"),
    ("question", "response"),
    ("input", "output"),
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
)
PROMPTS = ("question", "query", "problem")  # columns that alone can be a prompt
_LOOKED_AT = 1000
CHARACTERS_PER_TOKEN = 3  # on the safe side of the usual 4 for English


@dataclass(frozen=True)
class DataLook:
    """What the rows are. `pair` are columns to rename, answer None: prompts only; None: rows are taken as they are.
    `numbers` are those of them that hold numbers, which become texts; `turns` those that hold lists of turns.
    `template` makes the prompt of several columns. `unused` are columns of text that go nowhere."""

    rows: int
    pair: tuple[str, str | None] | None
    template: str | None
    numbers: frozenset[str]
    turns: frozenset[str]
    unused: tuple[str, ...]
    several_answers: int  # rows with more than one assistant turn
    chat: bool
    answered: bool
    running_text: bool
    answer_length: int  # characters; 95 % of the answers are no longer


def look_at(
    rows: Dataset,
    has_template: bool,
    columns: tuple[str, str | None] | None = None,
    template: str | None = None,
) -> DataLook:
    """Read the format off the first rows.

    Raises:
        ValueError: no format fits, with the columns that are there; or a row is broken.
    """
    template = None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")
    pair = _pair(rows, columns) if template is None else _pair_of_template(rows, columns, template)
    named = {name for name in pair or () if name is not None}
    numbers = frozenset(name for name in named if _is_number(rows, name))
    turns = frozenset(name for name in named if template is None and _is_chat(rows[0][name]))
    kinds, unused = [], []
    for number, raw in enumerate(rows.select(range(min(_LOOKED_AT, len(rows))))):
        place = RowPlace("train", number)
        row = raw if pair is None else _renamed(raw, pair, template, numbers | turns, has_template, place)
        kinds.append(canonical_row(row, place, has_template))
        unused += [name for name in unread(raw, kinds[-1], None) if name not in unused and _is_text(raw.get(name))]
    answers = sorted(len(text) for kind in kinds if (text := _answer(kind)) is not None)
    chats = [kind for kind in kinds if isinstance(kind, ChatRow)]
    return DataLook(
        rows=len(rows),
        pair=pair,
        template=template,
        numbers=numbers,
        turns=turns,
        unused=tuple(unused),
        several_answers=sum(sum(m["role"] == "assistant" for m in chat.messages) > 1 for chat in chats),
        chat=isinstance(kinds[0], ChatRow),
        answered=len(answers) == len(kinds),
        running_text=any(isinstance(kind, TextRow) and not kind.prompt for kind in kinds),
        answer_length=answers[int(0.95 * (len(answers) - 1))] if answers else 0,
    )


def _pair(rows: Dataset, columns: tuple[str, str | None] | None) -> tuple[str, str | None] | None:
    """The columns to rename; None when the rows have a known format."""
    names = rows.column_names
    if columns is not None:
        _check_columns([column for column in columns if column is not None], names)
        return columns
    if {"messages", "conversations", "instruction", "input_ids"} & set(names) or {"prompt", "completion"} <= set(
        names
    ):
        return None
    for question, answer in PAIRS:
        if question in names and answer in names:
            return question, answer
    if {"prompt", "text"} & set(names):
        return None
    alone = next((column for column in PROMPTS if column in names), None)
    if alone is None:
        raise ValueError(
            f"no format is known for the columns {', '.join(map(printable, names))}: name those of the question and "
            "the answer by --prompt_column and --completion_column, or make the prompt of several by --prompt_template"
        )
    return alone, None


def _pair_of_template(rows: Dataset, columns: tuple[str, str | None] | None, template: str) -> tuple[str, str | None]:
    """The first column of the template, and the answer's: the named one, or one with a known name."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"--prompt_template {template!r} is no template: {error}") from error
    fields = [str(part[1]) for part in parts]
    if not fields or any(part[2] or part[3] for part in parts):
        raise ValueError(f"--prompt_template {template!r} should name columns in braces, such as {{question}}")
    _check_columns(fields, rows.column_names)
    if columns is not None:
        _check_columns([column for column in columns[1:] if column is not None], rows.column_names)
        return fields[0], columns[1]
    known = [answer for _, answer in PAIRS if answer in rows.column_names and answer not in fields]
    return fields[0], known[0] if known else None


def _check_columns(columns: list[str], names: list[str]) -> None:
    missing = [column for column in columns if column not in names]
    if missing:
        there = ", ".join(map(printable, names))
        raise ValueError(f"there is no column {printable(missing[0])!r}: the data has {there}")


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))


def _is_number(rows: Dataset, name: str) -> bool:
    """Whether a column holds numbers, one in every row: what is missing is no text, and is reported."""
    numeric = str(getattr(rows.features[name], "dtype", "")).startswith(("int", "uint", "float"))
    return numeric and rows.data.column(name).null_count == 0


def _renamed(
    row: dict[str, Any],
    pair: tuple[str, str | None],
    template: str | None,
    as_they_are: frozenset[str],
    chat: bool,
    place: RowPlace,
) -> dict[str, Any]:
    """As the written recipe's `as_row` does it; what is no text there is named by the data's own column."""
    question, answer = pair
    used = [] if template is None else [str(field) for _, field, _, _ in string.Formatter().parse(template) if field]
    for name in {*(used or [question]), *([] if answer is None else [answer])}:
        if row[name] is None and name == answer:
            continue  # a prompt alone
        if row[name] is None:
            place.bad(printable(name), "is None; leave such rows out in load_data")
        if name not in as_they_are and not isinstance(row[name], (str, int, float) if name in used else str):
            place.bad(printable(name), f"should be text, got {describe(row[name])}; make it text in load_data")
    values = {
        name: value if value is None or isinstance(value, (str, list)) else str(value) for name, value in row.items()
    }
    prompt = values[question] if template is None else template.format(**values)
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt} if answer is None else {"prompt": prompt, "completion": values[answer]}


def _answer(kind: Row) -> str | None:
    if isinstance(kind, ChatRow):
        return None if kind.answer is None else str(kind.messages[kind.answer]["content"])
    if isinstance(kind, TokenRow):
        return "x" * CHARACTERS_PER_TOKEN * sum(label != -100 for label in kind.labels)
    return kind.completion
