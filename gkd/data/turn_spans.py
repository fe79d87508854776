r"""Where the earlier assistant turns of a chat stand in its rendering.

The chat is rendered once more with marks around the contents of all turns but the assistant's, so that what stands
between two of them is known, however a template writes it: the border of the turn before, the assistant's header, what
it says, the token that ends it, the next header. The header is what the generation prompt and the turn have in common:

    <|im_end|>\n<|im_start|>assistant\n<think>\n               the generation prompt behind a question
    <|im_end|>\n<|im_start|>assistant\nSeven.<|im_end|>\n<|im_start|>user\n        what stands in the chat

The end is found by what follows an answer (`EndOfTurn`), by the turn rendered alone, or by the last stop token. All of
it takes a number of renderings that does not grow with the number of turns, of short chats for turns with tool calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gkd.data.formats import ChatRow
from gkd.data.templates import STUMBLES, ChatTemplate, common_prefix
from gkd.data.turns import Message
from gkd.data.vocabulary import EndOfTurn

Span = tuple[int, int]  # first letter of a turn in the text, and the one behind its last


@dataclass(frozen=True)
class Gap:
    """What a template writes between two contents that are not the assistant's: the text, and where it begins."""

    text: str
    start: int


class Marks:
    """Marks that no text of the chat holds, and the contents between them."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.name = "QMark"
        while any(self.name in str(message) for message in messages):
            self.name += "Q"

    def _mark(self, kind: str, number: int) -> str:
        return f"{self.name}{kind}{number}x"

    def marked(self, message: Message, number: int) -> Message:
        """The message with marks around its content; inside the tags that Qwen's templates look for at its borders."""
        content, first, last = message["content"], "", ""
        if content.startswith("<tool_response>") and content.endswith("</tool_response>"):
            first, last = "<tool_response>", "</tool_response>"
            content = content[len(first) : -len(last)]
        content = first + self._mark("A", number) + content + self._mark("Z", number) + last
        return {**message, "content": content}

    def split(self, text: str, numbers: Sequence[int]) -> tuple[list[str], list[str]] | None:
        """What stands between the marked contents (one more than there are of these), and the contents; None unless
        the contents of these numbers stand there, each once and in order."""
        pieces = re.split(f"{self.name}([AZ])([0-9]+)x", text)
        found = [kind + number for kind, number in zip(pieces[1::3], pieces[2::3], strict=True)]
        if found != [f"{kind}{number}" for number in numbers for kind in "AZ"]:
            return None
        return pieces[0::6], pieces[3::6]


@dataclass(frozen=True)
class TurnFinder:
    """Finds assistant turns in the renderings of one template.

    Args:
        template: renders.
        turn: how it ends a turn.
        stops: texts of the tokens that end an answer.
        ids: token ids of a text.
        decode: text of token ids.
        closed: a rendering without what stands behind the token that ends its last answer.
    """

    template: ChatTemplate
    turn: EndOfTurn | None
    stops: tuple[str, ...]
    ids: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    closed: Callable[[str], str]

    def find(self, row: ChatRow, text: str, numbers: Sequence[int]) -> dict[int, Span]:
        """Where the turns of these numbers stand in `text`, the rendering of the row; some may be missing."""
        spans = self._between_marks(row, text, numbers)
        missing = (i for i in numbers if i not in spans)
        alone = {i: span for i in missing if (span := self._by_beginning(row, text, i)) is not None}
        return dict(sorted({**spans, **alone}.items()))

    def _by_beginning(self, row: ChatRow, text: str, number: int) -> Span | None:
        """A turn that ends where the rendering of the chat up to it does, if all of the chat begins like that."""
        prompt = self._render(row, row.messages[:number], generate=True)
        turn = self._render(row, row.messages[: number + 1])
        if prompt is None or turn is None or not text.startswith(prompt):
            return None
        end = self.closed(turn)
        return (len(prompt), len(end)) if text.startswith(end) and len(prompt) < len(end) else None

    def _between_marks(self, row: ChatRow, text: str, numbers: Sequence[int]) -> dict[int, Span]:
        marks, messages = Marks(row.messages), row.messages
        marked = [
            marks.marked(message, i)
            if message["role"] != "assistant" and (i > 0 or message["role"] not in ("system", "developer"))
            else message
            for i, message in enumerate(messages)
        ]
        places = [i for i, message in enumerate(marked) if message is not messages[i]]
        rendered = self._render(row, marked)
        split = None if rendered is None else marks.split(rendered, places)
        gaps = {} if split is None else _gaps(places, *split, text)
        if split is None or not gaps:
            return {}
        spans: dict[int, Span] = {}
        prompts: dict[str, str | None] = {}
        for i in numbers:
            if i - 1 not in gaps or i + 1 not in places:
                continue  # beside another turn of the assistant's: the marks do not tell the two apart
            gap, role = gaps[i - 1], messages[i - 1]["role"]
            if role not in prompts:
                prompts[role] = self._generation_prompt(row, marked[:i], marks, split[0])
            start = self._start(gap.text, prompts[role])
            end = None if start is None else self._end(row, i, gap.text, start)
            if start is not None and end is not None and start < end:
                spans[i] = (gap.start + start, gap.start + end)
        return spans

    def _render(self, row: ChatRow, messages: Sequence[Message], generate: bool = False) -> str | None:
        try:
            return self.template.render(messages, generate, row.tools, row.template_kwargs)
        except STUMBLES:
            return None

    def _generation_prompt(self, row: ChatRow, before: list[Message], marks: Marks, between: list[str]) -> str | None:
        """What a template writes behind the last content of `before` for the model to go on from."""
        places = [i for i, message in enumerate(before) if message is not row.messages[i]]
        rendered = self._render(row, before, generate=True)
        split = None if rendered is None else marks.split(rendered, places)
        if split is None:
            return None
        no_answers = all(message["role"] != "assistant" for message in before)
        if no_answers and split[0][:-1] != between[: len(places)]:
            return None  # a template that writes the beginning of a chat otherwise when more follows
        return split[0][-1]

    def _start(self, gap: str, prompt: str | None) -> int | None:
        """Where the turn begins: behind what it has in common with the generation prompt, in whole tokens."""
        if prompt is None:
            return None
        if gap.startswith(prompt):
            return len(prompt)
        ids = self.ids(prompt)
        header = self.decode(ids[: common_prefix(ids, self.ids(gap))])
        return len(header) if header and gap.startswith(header) else None

    def _end(self, row: ChatRow, number: int, gap: str, start: int) -> int | None:
        """Where the turn ends, the token that ends it included."""
        turn, message = self.turn, row.messages[number]
        plain = row.messages[number + 1]["role"] == "user" and not message.get("tool_calls")
        if plain and turn is not None and turn.next_kept and gap.endswith(turn.next_closing, start):
            return len(gap) - len(turn.next_closing) + len(turn.next_kept)
        alone = None if plain else self._alone(row, message)
        if alone is not None and gap.startswith(alone):
            end = max(len(alone), start)
            rest = gap[end:]
            stop = next((stop for stop in self.stops if rest.lstrip().startswith(stop)), "")
            return len(gap) - len(rest.lstrip()) + len(stop) if stop else end
        ends = [gap.rindex(stop, start) + len(stop) for stop in self.stops if stop in gap[start:]]
        return max(ends, default=None)

    def _alone(self, row: ChatRow, message: Message) -> str | None:
        """What stands behind the content of a question that this turn answers, up to the turn's end."""
        question = {"role": "user", "content": "Q"}
        marks = Marks([message])
        text = self._render(replace(row, tools=None), [marks.marked(question, 0), message])
        split = None if text is None else marks.split(text, [0])
        return None if split is None else split[0][1].rstrip()


def _gaps(places: list[int], between: list[str], contents: list[str], text: str) -> dict[int, Gap]:
    """By the number of a marked turn, what stands behind its content; {} unless all of it stands in `text`, too."""
    if not text.startswith(between[0]):
        return {}
    position, gaps = len(between[0]), {}
    for number, content, gap in zip(places, contents, between[1:], strict=True):
        forms = dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip()))
        form = next((form for form in forms if text.startswith(form + gap, position)), None)
        if form is None:
            return {}
        position += len(form)
        gaps[number] = Gap(gap, position)
        position += len(gap)
    return gaps
