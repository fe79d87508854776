"""Row formats. Whatever a data set calls its columns, a row becomes a chat, a pair of texts, or token ids.

| columns                                   | becomes                                                        |
| ----------------------------------------- | -------------------------------------------------------------- |
| `input_ids` + `labels`/`completion_mask`  | TokenRow, as it is                                             |
| `messages`, `conversations`               | ChatRow; turns `role`/`content` or ShareGPT's `from`/`value`   |
| `prompt` + `completion`, or `prompt`      | ChatRow for lists of turns, TextRow for plain text             |
| `instruction` + `input` + `output`        | ChatRow if the tokenizer has a chat template, else TextRow     |
| `text`                                    | TextRow without a prompt: cannot be rolled out                 |

The first of these whose leading column is not None decides, row by row. `tools`, `chat_template_kwargs` and `system`
(a system turn, when the chat has none) are honoured beside a chat. A row that fits none raises `ValueError` with its
number and column.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

Message = dict[str, Any]

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")}
ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"observation": "tool", "function_response": "tool"}

_RESERVED = {"tokenize", "add_generation_prompt", "tools", "conversation", "return_tensors", "return_dict"}
_RESERVED |= {"continue_final_message", "padding", "truncation", "max_length"}


@dataclass(frozen=True)
class Place:
    """Where a row stands: the data set's name and the row's number, for messages."""

    dataset: str
    number: int

    def bad(self, column: str, problem: str) -> NoReturn:
        raise ValueError(f"{self.dataset} data set, row {self.number}, column '{column}': {problem}")


@dataclass(frozen=True)
class ChatRow:
    """`messages[:answer]` is the prompt and `messages[answer]`, the last, the answer; answer None: prompt only.
    Assistant turns before `trained_from` stood in a `prompt` column and are never trained on."""

    messages: list[Message]
    answer: int | None
    trained_from: int = 0
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextRow:
    """Plain text; completion None: prompt only. An empty prompt marks running text, all of it completion."""

    prompt: str
    completion: str | None


@dataclass(frozen=True)
class TokenRow:
    """Token ids that come with their labels (-100 off target); the rollout starts at `prompt_length`."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


Row = ChatRow | TextRow | TokenRow


def canonical_row(row: Mapping[str, Any], place: Place, has_chat_template: bool) -> Row:
    """Reads a row of any format of the table above. Raises ValueError with row number and column."""
    known = [
        column
        for column in ("input_ids", "messages", "conversations", "prompt", "instruction", "text")
        if column in row
    ]
    column = next((column for column in known if row[column] is not None), None)
    if column is None and known:
        place.bad(known[0], "is None")
    if column is None:
        raise ValueError(
            f"{place.dataset} data set, row {place.number}: no format known for the columns {sorted(row)}. Rows need "
            f"`messages`, `conversations`, `prompt` (+ `completion`), `instruction` (+ `input`, `output`) or "
            f"`input_ids` + `labels`; rename the columns, or pass a formatting_func that returns such a row"
        )
    if column == "input_ids":
        return _token_row(row, place)
    if column in ("messages", "conversations"):
        return _chat_row(row, place, read_turns(row[column], place, column), column)
    if column == "prompt":
        return _prompt_row(row, place)
    if column == "instruction":
        return _instruction_row(row, place, has_chat_template)
    return TextRow("", _text(row, "text", place))


def _text(row: Mapping[str, Any], column: str, place: Place) -> str:
    if not isinstance(row[column], str):
        place.bad(column, f"should be text, got {_shown(row[column])}")
    return row[column]


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def without_none(value: Any) -> Any:
    """Takes out the None entries that Arrow puts where one row lacks a key that another row has."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value


# ------------------------------------------------------------------------------------------------------------ chats


def read_turns(turns: Any, place: Place, column: str) -> list[Message]:
    """A list of turns, `role`/`content` or `from`/`value`, checked, as `role`/`content` messages."""
    if not isinstance(turns, (list, tuple)):
        place.bad(column, f"should be a list of turns, got {_shown(turns)}")
    if not turns:
        place.bad(column, "has no turns")
    return [_message(turn, place, column, i) for i, turn in enumerate(turns)]


def _message(turn: Any, place: Place, column: str, i: int) -> Message:
    if not isinstance(turn, Mapping):
        place.bad(column, f"turn {i} should be a dict with 'role' and 'content', got {_shown(turn)}")
    role_key, content_key = ("from", "value") if turn.get("role") is None and "from" in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        place.bad(column, f"turn {i} has the unknown {role_key} {role!r}; known are {', '.join(ROLES)}")
    content = turn.get(content_key)
    if isinstance(content, (list, tuple)):
        content = _joined_parts(content, place, column, i)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        problem = "has no" if content is None else f"has {_shown(content)} as its"
        place.bad(column, f"turn {i} ({role}) {problem} '{content_key}'; it should be text")
    rest = {key: value for key, value in turn.items() if key not in ("role", "content", "from", "value")}
    return {"role": ROLES[role], "content": content, **without_none(rest)}


def _joined_parts(parts: list[Any] | tuple[Any, ...], place: Place, column: str, i: int) -> str:
    """A content given as parts, [{"type": "text", "text": ...}, ...], as one text."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            place.bad(column, f"turn {i} has a part that is not text: {_shown(part)}; only text can be trained on")
    return "".join(part["text"] for part in parts)


def _chat_row(
    row: Mapping[str, Any], place: Place, messages: list[Message], column: str, trained_from: int = 0
) -> ChatRow:
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        place.bad("system", f"should be text, got {_shown(system)}")
    if system and messages[0]["role"] != "system":
        messages, trained_from = [{"role": "system", "content": system}, *messages], trained_from + 1
    answer = len(messages) - 1 if messages[-1]["role"] == "assistant" else None
    if answer == 0:
        place.bad(column, "holds an answer only; a prompt is needed before it")
    return ChatRow(messages, answer, trained_from, _tools(row, place), _template_kwargs(row, place))


def _tools(row: Mapping[str, Any], place: Place) -> list[Any] | None:
    tools = _parsed(row, "tools", place)
    if tools is not None and not isinstance(tools, (list, tuple)):
        place.bad("tools", f"should be a list of tool descriptions, got {_shown(tools)}")
    return without_none(tools) or None


def _template_kwargs(row: Mapping[str, Any], place: Place) -> dict[str, Any]:
    values = _parsed(row, "chat_template_kwargs", place)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        place.bad("chat_template_kwargs", f"should be a dict, got {_shown(values)}")
    if taken := sorted(_RESERVED & values.keys()):
        place.bad("chat_template_kwargs", f"may not set {', '.join(taken)}")
    return without_none(values)


def _parsed(row: Mapping[str, Any], column: str, place: Place) -> Any:
    """A column that may hold JSON text, because Arrow wants one type for all rows."""
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        place.bad(column, f"is text but not JSON: {error}")


# ------------------------------------------------------------------------------------- prompt, instruction, token ids


def _prompt_row(row: Mapping[str, Any], place: Place) -> Row:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, str) and (completion is None or isinstance(completion, str)):
        if not prompt:
            place.bad("prompt", "is empty")
        return TextRow(prompt, completion)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = read_turns(prompt, place, "prompt")
    if completion is None:
        # An assistant turn at the end of a prompt is history, or the beginning of an answer: never a target.
        if messages[-1]["role"] == "assistant":
            place.bad("prompt", "ends with an assistant turn; put that turn into `completion`")
        return _chat_row(row, place, messages, "prompt")
    answer = read_turns(completion, place, "completion")
    if answer[-1]["role"] != "assistant":
        place.bad("completion", f"should end with an assistant turn, ends with {answer[-1]['role']}")
    return _chat_row(row, place, messages + answer, "prompt", trained_from=len(messages))


def _instruction_row(row: Mapping[str, Any], place: Place, has_chat_template: bool) -> Row:
    """Alpaca (`instruction`, `input`, `output`) and Dolly (`instruction`, `context`, `response`)."""
    columns = {
        part: next((name for name in names if row.get(name) is not None), None)
        for part, names in {"input": ("input", "context"), "output": ("output", "response")}.items()
    }
    instruction = _text(row, "instruction", place)
    if not instruction.strip():
        place.bad("instruction", "is empty")
    context = _text(row, columns["input"], place) if columns["input"] else ""
    output = _text(row, columns["output"], place) if columns["output"] else None
    if has_chat_template:
        messages = [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]
        messages += [] if output is None else [{"role": "assistant", "content": output}]
        return _chat_row(row, place, messages, "instruction")
    parts = [f"### Instruction:\n{instruction}", f"### Input:\n{context}" if context else "", "### Response:\n"]
    return TextRow("\n\n".join(part for part in parts if part), output)


def _token_row(row: Mapping[str, Any], place: Place) -> TokenRow:
    ids = _integers(row, "input_ids", place)
    columns = {
        name: _integers(row, name, place) for name in ("labels", "completion_mask", "attention_mask") if row.get(name)
    }
    for name, values in columns.items():
        if len(values) != len(ids):
            place.bad(name, f"has {len(values)} entries for {len(ids)} input_ids")
    labels = columns.get("labels")
    if labels is None:
        mask = columns.get("completion_mask", [0] * len(ids))
        labels = [i if m else -100 for i, m in zip(ids, mask, strict=True)]
    if wrong := [j for j, (i, label) in enumerate(zip(ids, labels, strict=True)) if label not in (-100, i)]:
        place.bad(
            "labels", f"entry {wrong[0]} is neither -100 nor the id of input_ids there (do not shift the labels)"
        )
    real = columns.get("attention_mask", [1] * len(ids))
    ids, labels = ([v for v, keep in zip(values, real, strict=True) if keep] for values in (ids, labels))
    if not ids:
        place.bad("input_ids", "is empty")
    targets = [j for j, label in enumerate(labels) if label != -100]
    end = targets[-1] + 1 if targets else len(ids)
    start = end if targets else len(ids)
    while targets and start > 0 and labels[start - 1] != -100:
        start -= 1
    prompt_length = row.get("prompt_length")
    if prompt_length is None:
        prompt_length = start
    elif not isinstance(prompt_length, int) or not 0 <= prompt_length <= len(ids):
        place.bad("prompt_length", f"should be a number of input_ids (0 to {len(ids)}), got {_shown(prompt_length)}")
    return TokenRow(ids[:end], labels[:end], prompt_length)


def _integers(row: Mapping[str, Any], column: str, place: Place) -> list[int]:
    values = row[column]
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, int) for value in values):
        place.bad(column, f"should be a list of integers, got {_shown(values)}")
    return [int(value) for value in values]
