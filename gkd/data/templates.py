"""Chat templates: rendering, whatever form a template wants a text in and whatever day it is.

Templates of models that see images write a content only where it is a list of parts; `ChatTemplate` finds out once
which form a template takes. Some templates write today's date (`strftime_now`): on another day the same chat has other
ids, and everything that was kept for its prompt is lost. `today` pins the date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

STUMBLES = (jinja2.TemplateError, TypeError)  # what a template raises over a chat that it cannot write
# What tokenizers and chat templates raise over a single row.
STUMBLES_OF_ROWS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_MARKER = "MarkOfTheAnswer"
_CALL = re.compile(r"""strftime_now\(\s*(['"])((?:(?!\1).)*)\1\s*\)""")


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: has a chat template.
        today: what `strftime_now` takes for today, as YYYY-MM-DD; None = the clock's day.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.source = str(tokenizer.chat_template)
        self._day = datetime.fromisoformat(today) if today else None
        self._parts = False
        self._parts = not self._writes_text() and self._writes_parts()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        generate: bool = False,
        tools: list[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as text, with the generation prompt behind it or not.

        Raises:
            one of STUMBLES: the template cannot write this chat.
        """
        chat = [self._message(message) for message in messages]
        source = self.tokenizer.get_chat_template(None, tools)
        text = self.tokenizer.apply_chat_template(
            chat,
            tools=tools,
            chat_template=source if self._day is None else dated(source, self._day),
            add_generation_prompt=generate,
            tokenize=False,
            **(options or {}),
        )
        return str(text)

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if self._parts and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        return dict(message)

    def _writes_text(self) -> bool:
        try:
            return _MARKER in self.render([{"role": "user", "content": _MARKER}])
        except STUMBLES:
            return False

    def _writes_parts(self) -> bool:
        self._parts = True
        return self._writes_text()


def dated(source: str, day: datetime) -> str:
    """A template with this day in the place of the clock's. (transformers lets no function into a template.)"""
    return _CALL.sub(lambda call: json.dumps(day.strftime(call[2])), source)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many ids (or letters) both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
