"""What a row holds and its chat template does not write: counted, and named in the report.

Each finding is a key of `gkd.data.row_report.NOTES`. That earlier turns lose their thoughts is how thinking models are
served: that is no finding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

from gkd.data.formats import ChatRow
from gkd.data.templates import STUMBLES, ChatTemplate
from gkd.data.turns import Message

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TAG = re.compile(r"</?think>")
_EMPTY_THOUGHT = re.compile(r"\s*(<think>)?\s*</think>")


def left_out(template: ChatTemplate, row: ChatRow, text: str) -> Iterator[str]:
    """Findings of a row whose rendering is `text`."""
    if any(name not in template.source for name in row.template_kwargs):
        yield "options_left_out"
    if row.tools and _rendered(template, replace(row, tools=None)) == text:
        yield "tools_left_out"
    yield from _keys_left_out(template, row)
    yield from dict.fromkeys(_contents_left_out(row, text))


def has_empty_thought(answer: str) -> bool:
    """Whether a rendered answer begins with a thought of nothing, which the template has put there."""
    return _EMPTY_THOUGHT.match(answer) is not None


def _rendered(template: ChatTemplate, row: ChatRow) -> str | None:
    try:
        return template.render(row.messages, row.answer is None, row.tools, row.template_kwargs)
    except STUMBLES:
        return None


def _keys_left_out(template: ChatTemplate, row: ChatRow) -> Iterator[str]:
    """Calls of any turn, and thoughts of the answer, are marked to see whether they are written."""
    marks: dict[str, str] = {}  # mark -> finding
    messages = [_marked(message, i == row.answer, marks) for i, message in enumerate(row.messages)]
    if not marks:
        return
    text = _rendered(template, replace(row, messages=messages))
    if text is not None:
        yield from dict.fromkeys(finding for mark, finding in marks.items() if mark not in text)


def _marked(message: Message, is_answer: bool, marks: dict[str, str]) -> Message:
    if message["role"] != "assistant":
        return message
    changed = dict(message)
    for key in _THOUGHTS if is_answer else ():
        if isinstance(message.get(key), str) and message[key].strip():
            changed[key] = _new_mark(marks, "thought_left_out")
    calls = message.get("tool_calls")
    if isinstance(calls, (list, tuple)):
        changed["tool_calls"] = [_marked_call(call, marks) for call in calls]
    return changed


def _marked_call(call: object, marks: dict[str, str]) -> object:
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if isinstance(function, dict) and "name" in function:
        return {**call, "function": {**function, "name": _new_mark(marks, "calls_left_out")}}
    return {**call, "name": _new_mark(marks, "calls_left_out")} if "name" in call else call


def _new_mark(marks: dict[str, str], finding: str) -> str:
    mark = f"QMarkQ{len(marks)}x"
    marks[mark] = finding
    return mark


def _contents_left_out(row: ChatRow, text: str) -> Iterator[str]:
    """Contents are looked for one behind the other, without spaces, which templates take away and add."""
    squeezed, position = _squeezed(text), 0
    for i, message in enumerate(row.messages):
        pieces = _TAG.split(message["content"]) if message["role"] == "assistant" else [message["content"]]
        for piece in pieces if i == row.answer else pieces[-1:]:
            forms = (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])
            found = _find([_squeezed(form) for form in forms], squeezed, position)
            if found is not None:
                position = found
            elif message["role"] != "tool" or piece.lstrip()[:1] not in ("{", "["):  # JSON may be written otherwise
                yield "answer_shortened" if i == row.answer else "content_left_out"


def _find(forms: list[str], text: str, position: int) -> int | None:
    """Where one of these forms ends in a text, looked for from a position on, then from the beginning."""
    for start in (position, 0):
        for form in forms:
            place = text.find(form, start)
            if place >= 0:
                return place + len(form) if start == position else position
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())
