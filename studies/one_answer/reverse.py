"""The task: a word backwards. There is one right answer to each."""

from __future__ import annotations

import random

LETTERS, MARK = "abcdefgh", ">"
LENGTH = 8


def draw_word(draw: random.Random) -> str:
    """Letters at random."""
    return "".join(draw.choice(LETTERS) for _ in range(LENGTH))
