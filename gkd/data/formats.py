"""Row formats. Whatever a data set calls its columns, a row becomes a chat, a pair of texts, or token ids.

| columns                                         | becomes                                                       |
| ----------------------------------------------- | ------------------------------------------------------------- |
| `input_ids` with `labels` or a mask             | TokenRow (`gkd.data.token_rows`) |
| `messages`, `conversations`                     | ChatRow (`gkd.data.turns` reads the turns) |
| `prompt` + `completion`, or `prompt`            | ChatRow for lists of turns, TextRow for plain text            |
| `instruction` + `input` + `output`, `history`   | ChatRow if the tokenizer has a chat template, else TextRow    |
| `text`                                          | TextRow without a prompt: cannot be rolled out                |

The first of these whose leading column is not None decides, row by row. `tools` (or OpenAI's older `functions`),
`chat_template_kwargs` and `system` (a system turn, when the chat has none) are honoured beside a chat. What else a
row holds is counted (`gkd.data.unread`). A row that fits none raises `ValueError` with its number and column.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gkd.data.row_values import RowPlace, describe, from_json, text_of, without_none
from gkd.data.token_rows import TokenRow, token_row
from gkd.data.turns import Message, Turn, chat_as_text, read_turns

__all__ = [
    "LEADING",
    "ChatRow",
    "Message",
    "Row",
    "RowPlace",
    "TextRow",
    "TokenRow",
    "canonical_row",
    "leading_column",
]

_LONG_PROMPT = 20  # characters; an answer that begins with a shorter prompt may mean it
LEADING = ("input_ids", "messages", "conversations", "prompt", "instruction", "text")
# What would take the rendering out of the hands of this package, or the template out of the model's.
_RESERVED = {"tokenize", "add_generation_prompt", "tools", "conversation", "return_tensors", "return_dict"}
_RESERVED |= {"continue_final_message", "padding", "truncation", "max_length", "chat_template", "tokenizer_kwargs"}
_RESERVED |= {"return_assistant_tokens_mask", "messages", "documents"}


@dataclass(frozen=True)
class ChatRow:
    """`messages[:answer]` is the prompt and `messages[answer]`, the last, the answer; answer None: prompt only.

    `untrained` are the assistant turns that are never trained on: they stood in a `prompt` column, or a flag says so.
    `notes` are keys of `gkd.data.row_report.NOTES`.
    """

    messages: list[Message]
    answer: int | None
    untrained: frozenset[int] = frozenset()
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def up_to_last_answer(self) -> ChatRow:
        """A chat that ends without an answer, without what stands behind the last one that can be trained on."""
        answers = [i for i, message in enumerate(self.messages) if i > 0 and message["role"] == "assistant"]
        trained = [i for i in answers if i not in self.untrained]
        if self.answer is not None or not trained:
            return self
        messages, untrained = self.messages[: trained[-1] + 1], frozenset(i for i in self.untrained if i < trained[-1])
        notes = (*self.notes, "question_left_out")
        return replace(self, messages=messages, answer=trained[-1], untrained=untrained, notes=notes)


@dataclass(frozen=True)
class TextRow:
    """Plain text; completion None: prompt only. An empty prompt marks running text, all of it completion."""

    prompt: str
    completion: str | None
    notes: tuple[str, ...] = ()


Row = ChatRow | TextRow | TokenRow


def leading_column(row: Mapping[str, Any]) -> str | None:
    """The column that decides a row's format: the first known one that is not None."""
    return next((column for column in LEADING if row.get(column) is not None), None)


def canonical_row(
    row: Mapping[str, Any], place: RowPlace, has_chat_template: bool, exact: Collection[str] = ()
) -> Row:
    """Reads a row of any format of the table above. `exact`: columns whose None entries are the user's, not Arrow's.

    Raises:
        ValueError: with row number and column.
    """
    column = leading_column(row)
    if column is None and (empty := [name for name in LEADING if name in row]):
        place.bad(empty[0], "is None")
    if column is None:
        raise ValueError(
            f"{place}: no format known for the columns {sorted(map(str, row))}. "
            "Rows need `messages`, `conversations`, `prompt` (+ `completion`), `instruction` (+ `input`, `output`) or "
            "`input_ids` + `labels`; rename the columns, or pass a formatting_func that returns such a row"
        )
    if column == "input_ids":
        return token_row(row, place)
    if column == "text":
        return TextRow("", text_of(row, "text", place))
    reader = _Reader(row, place, exact)
    if column == "prompt":
        return reader.prompt()
    if column == "instruction":
        return reader.instruction(has_chat_template)
    return reader.chat(reader.turns(row[column], column), column)


@dataclass(frozen=True)
class _Reader:
    """Reads the columns of one row."""

    row: Mapping[str, Any]
    place: RowPlace
    exact: Collection[str]

    def turns(self, value: Any, column: str) -> list[Turn]:
        return read_turns(value, self.place, column, column in self.exact)

    def chat(self, turns: list[Turn], column: str, notes: tuple[str, ...] = ()) -> ChatRow:
        system = self.row.get("system")
        if system is not None and not isinstance(system, str):
            self.place.bad("system", f"should be text, got {describe(system)}")
        if system and turns[0].role != "system":
            turns = [Turn({"role": "system", "content": system}), *turns]
        answer = len(turns) - 1 if turns[-1].role == "assistant" else None
        if answer == 0:
            self.place.bad(column, "holds an answer only; a prompt is needed before it")
        if any(turn.trained and turn.role != "assistant" for turn in turns):
            notes = (*notes, "flag_not_honoured")
        untrained = frozenset(i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.trained is False)
        messages = [turn.message for turn in turns]
        return ChatRow(messages, answer, untrained, self.tools(), self.template_kwargs(), notes)

    def tools(self) -> list[Any] | None:
        tools = self.parsed("tools")
        if tools is not None and not isinstance(tools, (list, tuple)):
            self.place.bad("tools", f"should be a list of tool descriptions, got {describe(tools)}")
        for tool in tools or ():
            if not isinstance(tool, Mapping) or not tool:
                self.place.bad("tools", f"should hold descriptions of tools, holds {describe(tool)}")
        if tools or self.row.get("functions") is None:
            return list(tools) if tools else None
        functions = self.parsed("functions")
        if not isinstance(functions, (list, tuple)):
            self.place.bad("functions", f"should be a list of function descriptions, got {describe(functions)}")
        for function in functions:
            if not isinstance(function, Mapping) or not function:
                self.place.bad("functions", f"should hold descriptions of functions, holds {describe(function)}")
        return [{"type": "function", "function": function} for function in functions] or None

    def template_kwargs(self) -> dict[str, Any]:
        values = self.parsed("chat_template_kwargs")
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            self.place.bad("chat_template_kwargs", f"should be a dict, got {describe(values)}")
        if taken := sorted(_RESERVED & values.keys()):
            self.place.bad("chat_template_kwargs", f"may not set {', '.join(taken)}")
        return dict(values)

    def parsed(self, column: str) -> Any:
        """A column that may hold JSON text, without Arrow's nulls."""
        value = self.row.get(column)
        if isinstance(value, str):
            return from_json(value, column, self.place)
        return value if column in self.exact else without_none(value)

    # --------------------------------------------------------------------------------- prompt and completion

    def prompt(self) -> Row:
        prompt, completion = self.row["prompt"], self.row.get("completion")
        for column, value in (("prompt", prompt), ("completion", completion)):
            if not isinstance(value, (str, list, tuple, type(None))):
                self.place.bad(column, f"should be text or a list of turns, got {describe(value)}")
        as_text = chat_as_text(prompt)
        if isinstance(prompt, str) and not as_text and (completion is None or isinstance(completion, str)):
            if not prompt:
                self.place.bad("prompt", "is empty")
            twice = completion is not None and len(prompt) >= _LONG_PROMPT and completion.startswith(prompt)
            return TextRow(prompt, completion, ("prompt_twice",) if twice else ())
        if isinstance(prompt, str) and not as_text:
            prompt = [{"role": "user", "content": prompt}]
        # An assistant turn in a prompt is history, or the beginning of an answer: never a target.
        read = self.turns(prompt, "prompt")
        notes = ("flag_not_honoured",) if any(turn.trained for turn in read) else ()
        turns = [replace(turn, trained=False) for turn in read]
        if completion is None:
            if turns[-1].role == "assistant":
                self.place.bad("prompt", "ends with an assistant turn; put that turn into `completion`")
            return self.chat(turns, "prompt", notes)
        if isinstance(completion, str) and not (as_text and chat_as_text(completion)):
            completion = [{"role": "assistant", "content": completion}]
        answer = self.turns(completion, "completion")
        if answer[-1].role != "assistant":
            self.place.bad("completion", f"should end with an assistant turn, ends with {answer[-1].role}")
        rest = _rest_of(answer, turns)
        if rest is None:
            return self.chat([*turns, *answer], "prompt", notes)
        systems = [turn for turn in answer if turn.role == "system"]
        if systems and turns[0].role == "system" and [turn.message for turn in systems] != [turns[0].message]:
            self.place.bad("completion", "repeats the prompt with another system turn")
        head = turns if turns[0].role == "system" else [*systems, *turns]
        return self.chat([*head, *rest], "prompt", (*notes, "prompt_repeated"))

    # ------------------------------------------------------------------------------------------- instruction

    def instruction(self, has_chat_template: bool) -> Row:
        """Alpaca (`instruction`, `input`, `output`, `history`) and Dolly (`instruction`, `context`, `response`)."""
        names = {"input": self.first("input", "context"), "output": self.first("output", "response")}
        instruction, context, output = (
            "" if name is None else text_of(self.row, name, self.place) for name in ("instruction", *names.values())
        )
        if not instruction.strip():
            self.place.bad("instruction", "is empty")
        answer = None if names["output"] is None else output
        rounds = self.history()
        if has_chat_template:
            asked = [*rounds, (f"{instruction}\n\n{context}" if context else instruction, answer)]
            turns = []
            for question, reply in asked:
                turns.append(Turn({"role": "user", "content": question}))
                turns += [] if reply is None else [Turn({"role": "assistant", "content": reply})]
            return self.chat(turns, "instruction")
        system = "" if self.row.get("system") is None else text_of(self.row, "system", self.place)
        before = [system] if system else []
        before += [_alpaca(question) + reply for question, reply in rounds]
        return TextRow("\n\n".join([*before, _alpaca(instruction, context)]), answer)

    def first(self, *names: str) -> str | None:
        return next((name for name in names if self.row.get(name) is not None), None)

    def history(self) -> list[tuple[str, str]]:
        """The rounds before the instruction: [[question, answer], ...]."""
        rounds = self.parsed("history") or []
        for pair in rounds if isinstance(rounds, (list, tuple)) else [rounds]:
            if not isinstance(pair, (list, tuple)) or [type(text) for text in pair] != [str, str]:
                self.place.bad("history", f"should hold pairs of question and answer, holds {describe(pair)}")
        return [(question, answer) for question, answer in rounds]


def _alpaca(instruction: str, context: str = "") -> str:
    parts = [f"### Instruction:\n{instruction}", f"### Input:\n{context}" if context else "", "### Response:\n"]
    return "\n\n".join(part for part in parts if part)


def _rest_of(answer: list[Turn], prompt: list[Turn]) -> list[Turn] | None:
    """What a completion adds to the prompt that it repeats, system turns aside; None: it does not repeat it."""
    asked, said = ([turn for turn in turns if turn.role != "system"] for turns in (prompt, answer))
    repeats = len(said) > len(asked) and [t.message for t in said[: len(asked)]] == [t.message for t in asked]
    return said[len(asked) :] if repeats and asked else None
