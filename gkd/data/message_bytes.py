"""What a teacher behind a chat address reads and writes, in "ids" that are bytes: so it is kept as all others are.

A prompt is the UTF-8 of its messages as JSON, a completion that of its text, with `END` behind it where the teacher
ended it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gkd.data.encoded import Encoded
from gkd.data.formats import ChatRow, Row, TextRow
from gkd.data.row_values import RowPlace
from gkd.data.targets import IGNORE

END = 256
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")  # of a message, as such an address takes them


def bytes_of(text: str) -> list[int]:
    """The UTF-8 of a text; half of a pair of surrogates, which has none, becomes a question mark."""
    return list(text.encode("utf-8", "replace"))


def text_of(ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < END).decode("utf-8", "replace")


def messages_of(prompt: Sequence[int]) -> list[dict[str, Any]]:
    """The messages of a prompt."""
    return list(json.loads(bytes(prompt)))


class MessageBytes:
    """In the place of an encoder of rows, and of a tokenizer for whoever shows them."""

    def encode(self, row: Row, place: RowPlace) -> Encoded:
        """The row's prompt; a text is the one turn of a user.

        Raises:
            ValueError: a row of ids, or one with tools, which an answer as text cannot call.
        """
        if isinstance(row, ChatRow):
            if row.tools:
                place.bad("tools", "cannot be called by a teacher behind teacher_chat_url, which answers with text")
            messages = row.messages if row.answer is None else row.messages[: row.answer]
        elif isinstance(row, TextRow):
            messages = [{"role": "user", "content": row.prompt}]
        else:
            place.bad("input_ids", "is no text, which is all that a teacher behind teacher_chat_url reads")
        sent = [{key: turn[key] for key in _KEYS if turn.get(key) is not None} for turn in messages]
        ids = bytes_of(json.dumps(sent, ensure_ascii=False, separators=(",", ":")))
        return Encoded(ids, [IGNORE] * len(ids), len(ids))

    def check_ids(self, ids: Sequence[int], column: str, place: RowPlace) -> None:
        """Raises ValueError for what is no byte."""
        if wrong := [i for i in ids if not 0 <= i < END]:
            place.bad(column, f"holds {wrong[0]}, and what a teacher behind teacher_chat_url reads is bytes")

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return text_of(ids)
