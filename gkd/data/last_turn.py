"""The last question of a prompt, for tables: without the system turn and the signs that a chat template writes."""

from __future__ import annotations

import jinja2
from transformers import PreTrainedTokenizerBase

_FIRST, _ANSWER, _LAST = "FirstQuestion", "AnswerToIt", "LastQuestion"


class LastTurn:
    """Cuts the last user turn out of prompts as text.

    Args:
        tokenizer: its chat template is asked what it writes before and behind a user's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._opening, self._closing = _around_a_turn(tokenizer)

    def __call__(self, prompt: str) -> str:
        """The last user turn; the whole prompt where the template's signs are not in it."""
        start = prompt.rfind(self._opening) if self._opening.strip() else -1
        if start < 0:
            return prompt
        turn = prompt[start + len(self._opening) :]
        end = turn.rfind(self._closing) if self._closing else -1
        return (turn if end < 0 else turn[:end]).strip() or prompt


def _around_a_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What stands before a user's turn wherever it stands, and behind the last one; empty without a template."""
    user, answer, last = (
        {"role": role, "content": content}
        for role, content in (("user", _FIRST), ("assistant", _ANSWER), ("user", _LAST))
    )
    try:
        texts = [
            str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            for turns in ([last], [user, answer, last])
        ]
    except (jinja2.TemplateError, TypeError, ValueError):  # none, or one that takes no such chat
        return "", ""
    if any(_LAST not in text for text in texts) or _ANSWER not in texts[1]:
        return "", ""
    alone, behind = texts[0].split(_LAST, 1)
    after_an_answer = texts[1].partition(_ANSWER)[2].partition(_LAST)[0]
    start = 0
    while start < min(len(alone), len(after_an_answer)) and alone[-1 - start] == after_an_answer[-1 - start]:
        start += 1
    return alone[len(alone) - start :], behind.split("\n")[0] or behind
