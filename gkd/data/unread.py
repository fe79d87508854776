"""What a row holds and nothing reads: counted, column by column; images and sound refused.

A column counts as read when the row's format reads it, or when all of its text stands in the row that came of it, as
it does for columns that a recipe or a `formatting_func` has made the row from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gkd.data import token_rows
from gkd.data.formats import ChatRow, Row, TextRow, leading_column
from gkd.data.row_values import RowPlace, describe, is_empty
from gkd.data.token_rows import WRITTEN_BY, TokenRow

NOT_TEXT = (
    "images",
    "image",
    "videos",
    "video",
    "audios",
    "audio",
    "pixel_values",
    "image_grid_thw",
    "input_features",
)

# Columns of rows of ids that say no more: written by this package, by `datasets` or by TRL's own preparation.
_BESIDE_IDS = {"row", "prompt", "completion", "text", "truncated", "repetitive", "source_row", "length"}
_BESIDE_IDS |= {"special_tokens_mask", "token_type_ids", WRITTEN_BY}
# Keys of a turn that need no reader: ids, and those whose rendering is looked at (`gkd.data.encode`).
_KEYS = {"role", "content", "tool_calls", "reasoning_content", "thinking", "tool_call_id", "id"}


def refuse_other_than_text(row: Mapping[str, Any], place: RowPlace) -> None:
    """Raises ValueError for a row with images, video or sound: its text alone is another task."""
    for column in NOT_TEXT:
        if column in row and not is_empty(row[column]):
            place.bad(
                column,
                f"holds {describe(row[column])}, but only text is trained on: take these rows out, or the column "
                f"(remove_columns) if the text says all without it",
            )


def unread(
    row: Mapping[str, Any], made: Row, template: str | None, honoured: Iterable[str] = (), beside: Row | None = None
) -> list[str]:
    """Names of what nothing reads: columns, and keys of turns (as `messages[].key`).

    Args:
        row: as it stood in the data set, or came from a formatting_func.
        made: what became of it.
        template: the chat template's source.
        honoured: columns that are read elsewhere.
        beside: what became of it for the teacher, where that differs.
    """
    read = {*honoured, *_reads(row, made)}
    rest = [column for column, value in row.items() if column not in read and not is_empty(value)]
    if not rest and not isinstance(made, ChatRow):
        return []
    said = "\0".join((*_texts(made), *_texts(beside)))
    names = [str(column) for column in rest if not _stands_in(row[column], said)]
    return names + (_unread_keys(made, template or "") if isinstance(made, ChatRow) else [])


def _reads(row: Mapping[str, Any], made: Row) -> set[str]:
    """The columns that the row's format reads; of those with two names (output, response) the text tells."""
    if isinstance(made, TokenRow):
        return {*token_rows.READ, *_BESIDE_IDS}
    leading = leading_column(row)
    read = {leading or "", *{"prompt": ("completion",), "instruction": ("history",)}.get(leading or "", ())}
    if isinstance(made, ChatRow):
        read |= {"chat_template_kwargs", "functions" if is_empty(row.get("tools")) else "tools"}
    return read


def _texts(made: Any) -> Iterable[str]:
    """Every text in what became of a row."""
    if isinstance(made, ChatRow):
        yield from _texts(made.messages)
    elif isinstance(made, TokenRow):
        return
    elif isinstance(made, TextRow):
        yield from (made.prompt, made.completion or "")
    elif isinstance(made, Mapping):
        for key, value in made.items():
            yield from () if key == "role" else _texts(value)
    elif isinstance(made, (list, tuple)):
        for value in made:
            yield from _texts(value)
    elif made is not None:
        yield str(made)


def _stands_in(value: Any, said: str) -> bool:
    """Whether each text and number of a column stands in what became of the row."""
    if isinstance(value, bool):
        return False
    if isinstance(value, Mapping):
        return all(_stands_in(item, said) for item in value.values() if item is not None)
    if isinstance(value, (list, tuple)):
        return all(_stands_in(item, said) for item in value if item is not None)
    text = str(value).strip()
    if len(text) > 3:
        return text in said
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said) is not None  # "A" is no part of "As"


def _unread_keys(chat: ChatRow, template: str) -> list[str]:
    """Keys of turns that the template does not mention. One that writes whole turns as JSON mentions them all."""
    keys = {str(key) for message in chat.messages for key, value in message.items() if not is_empty(value)} - _KEYS
    if not keys or re.search(r"\.items\(\)|\b(message|msg|m|turn)\s*\|\s*tojson", template):
        return []
    return [f"messages[].{key}" for key in sorted(keys) if not re.search(rf"\b{re.escape(key)}\b", template)]
