"""Turns of a chat, in any spelling of data sets, as the `role`/`content` messages that chat templates read.

| in the data                                                     | in the message                                  |
| --------------------------------------------------------------- | ----------------------------------------------- |
| `from`/`value`, other names of roles, content as parts of text  | `role`/`content`                                |
| a call's `arguments` as JSON text                               | the same as a mapping                           |
| `function_call` (OpenAI's older form, ShareGPT's role)          | `tool_calls` of an assistant turn               |
| `weight`, `trainable`, `loss_mask`, `loss`, `train`, `training` | none: whether the turn is trained on            |
| the whole chat as JSON text                                     | read; nulls in it are the user's and stay       |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gkd.data.row_values import RowPlace, describe, from_json, is_empty, without_none

Message = dict[str, Any]

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")}
ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"observation": "tool", "function_response": "tool", "tool_response": "tool"}
CALLING_ROLES = ("function_call", "tool_call")  # ShareGPT: an assistant turn that is a call, as JSON
TRAINING_FLAGS = ("weight", "trainable", "loss_mask", "loss", "train", "training")

_READ_HERE = {"role", "content", "from", "value", "tool_calls", "function_call", *TRAINING_FLAGS}
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Turn:
    """A message, and what the row says of its training (None: nothing)."""

    message: Message
    trained: bool | None = None

    @property
    def role(self) -> str:
        return str(self.message["role"])


def read_turns(turns: Any, place: RowPlace, column: str, exact: bool = False) -> list[Turn]:
    """The turns of a chat, checked. `exact`: its None entries are the user's own, not Arrow's.

    Raises:
        ValueError: with data set, row, column and turn.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns, exact = from_json(turns, column, place), True
    if not isinstance(turns, (list, tuple)):
        place.bad(column, f"should be a list of turns, got {describe(turns)}")
    if not turns:
        place.bad(column, "has no turns")
    read = [_Reader(place, column, i, exact).turn(turn) for i, turn in enumerate(turns)]
    if any(isinstance(turn, Mapping) and turn.get("function_call") is not None for turn in turns):
        read = [_answering(turn) for turn in read]
    return _merged_calls(read, turns)


def chat_as_text(value: Any) -> bool:
    """Whether a text is a chat as JSON: a list of turns, and nothing else can be meant."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return bool(turns) and all(
        isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
        for turn in turns
    )


def _answering(turn: Turn) -> Turn:
    """What answers an older `function_call` is a tool's turn, as the call is a tool call."""
    return replace(turn, message={**turn.message, "role": "tool"}) if turn.role == "function" else turn


def _merged_calls(read: list[Turn], raw: Any) -> list[Turn]:
    """Calls one behind another, each as a turn of its own, are one turn with several calls."""
    out: list[Turn] = []
    calling_before = False
    for turn, source in zip(read, raw, strict=True):
        calling = (source.get("role") or source.get("from")) in CALLING_ROLES
        if calling and calling_before and turn.trained == out[-1].trained:
            before = out[-1].message
            calls = [*before["tool_calls"], *turn.message["tool_calls"]]
            out[-1] = replace(out[-1], message={**before, "tool_calls": calls})
        else:
            out.append(turn)
        calling_before = calling
    return out


@dataclass(frozen=True)
class _Reader:
    """Reads turn `i` of a column."""

    place: RowPlace
    column: str
    i: int
    exact: bool

    def bad(self, problem: str) -> Any:
        self.place.bad(self.column, f"turn {self.i} {problem}")

    def turn(self, turn: Any) -> Turn:
        if not isinstance(turn, Mapping):
            self.bad(f"should be a dict with 'role' and 'content', got {describe(turn)}")
        sharegpt = turn.get("role") is None and "from" in turn
        role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
        role, content = turn.get(role_key), turn.get(content_key)
        if not isinstance(role, str) or role not in (*ROLES, *CALLING_ROLES):
            self.bad(f"has the unknown {role_key} {role!r}; known are {', '.join((*ROLES, *CALLING_ROLES))}")
        self._check_other_spelling(turn, sharegpt, ROLES.get(role, role), content)
        rest = {key: value for key, value in turn.items() if key not in _READ_HERE and value is not None}
        rest = rest if self.exact else without_none(rest)
        calls = self._calls(turn)
        if role in CALLING_ROLES:
            calls, content, role = [*calls, *self._calls_in(content, content_key)], "", "assistant"
        if isinstance(content, (list, tuple)):
            content = self._joined_parts(content)
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            problem = "has no" if content is None else f"has {describe(content)} as its"
            self.place.bad(self.column, f"turn {self.i} ({role}) {problem} '{content_key}'; it should be text")
        message = {"role": ROLES[role], "content": content, **rest, **({"tool_calls": calls} if calls else {})}
        return Turn(message, self._flag(turn))

    def _check_other_spelling(self, turn: Mapping[str, Any], sharegpt: bool, role: str, content: Any) -> None:
        """A turn may have both spellings where they say the same."""
        role_key, content_key = ("role", "content") if sharegpt else ("from", "value")
        other_role, other = turn.get(role_key), turn.get(content_key)
        if other_role is not None and ROLES.get(str(other_role), other_role) != role:
            self.bad(f"has the role {role!r} and, as '{role_key}', {other_role!r}")
        if other is not None and other != content:
            self.bad(f"has '{content_key}' beside its content, and it says something else")

    def _flag(self, turn: Mapping[str, Any]) -> bool | None:
        said = {key: turn[key] for key in TRAINING_FLAGS if turn.get(key) is not None}
        for key, value in said.items():
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                self.bad(f"has {describe(value)} as its '{key}'; it should be 1 or 0, for trained on or not")
        if len({bool(value) for value in said.values()}) > 1:
            self.bad(f"is to be trained on by one of {', '.join(said)} and not by another")
        return bool(next(iter(said.values()))) if said else None

    def _joined_parts(self, parts: list[Any] | tuple[Any, ...]) -> str:
        """A content given as parts, [{"type": "text", "text": ...}, ...], as one text."""
        for part in parts:
            wrong = not isinstance(part, Mapping) or not isinstance(part.get("text"), str)
            if wrong or part.get("type", "text") not in (None, *_TEXT_PARTS):
                self.bad(f"has a part that is not text: {describe(part)}; only text can be trained on")
            if more := sorted(str(k) for k, v in part.items() if k not in ("type", "text") and not is_empty(v)):
                self.bad(f"has a part of text with more in it, which nothing reads: {', '.join(more)}")
        return "".join(part["text"] for part in parts)

    # ------------------------------------------------------------------------------------------------- tool calls

    def _calls(self, turn: Mapping[str, Any]) -> list[Message]:
        calls = turn.get("tool_calls")
        exact = self.exact or isinstance(calls, str)
        calls = from_json(calls, self.column, self.place) or []
        if not isinstance(calls, (list, tuple)):
            self.bad(f"has {describe(calls)} as its 'tool_calls'; it should be a list of calls")
        read = [self._call(call, "tool_calls", exact) for call in calls]
        older = turn.get("function_call")
        return read if older is None else [*read, *self._calls_in(older, "function_call")]

    def _calls_in(self, value: Any, key: str) -> list[Message]:
        """Calls as {"name": ..., "arguments": ...}, one or a list of them, which may be JSON text."""
        exact = self.exact or isinstance(value, str)
        value = from_json(value, self.column, self.place)
        functions = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(function, Mapping) and "function" in function for function in functions):
            return [self._call(function, key, exact) for function in functions]
        return [self._call({"type": "function", "function": function}, key, exact) for function in functions]

    def _call(self, call: Any, key: str, exact: bool) -> Message:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            self.bad(f"has a call in '{key}' without a name and arguments: {describe(call)}")
        arguments = function.get("arguments")
        plain = dict(call) if exact else without_none(call)
        if not isinstance(arguments, str):
            return plain
        read = {**plain.get("function", plain), "arguments": _arguments(arguments)}
        return {**plain, "function": read} if "function" in call else read


def _arguments(text: str) -> Any:
    """Arguments as JSON text, as the mapping that templates write; what is no JSON object stays as it is."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
