"""Markdown whose text cannot break out of its place: cells, captions, code, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;", "*": "&#42;"}


def escape_cell(value: object) -> str:
    """Any value on one line of text, or in one cell of a table; None as a dash."""
    text = "–" if value is None else str(value)
    # An entity, not a backslash: a backslash already in front of a pipe would be read differently by each reader.
    for character, entity in _ENTITIES.items():
        text = text.replace(character, entity)
    return "<br>".join(text.replace("\r", "").split("\n"))


def escape_caption(text: str) -> str:
    """Text for the square brackets of an image or a link."""
    return re.sub(r"([\[\]\\])", r"\\\1", text.replace("\n", " "))


def inline_code(text: str) -> str:
    """Text in single backticks."""
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks in the text, so that the text cannot end it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "") -> str:
    """A GitHub table; `align` holds one letter for each column, `r` for numbers (default: all to the left)."""
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(heading))]
    lines = [" | ".join(map(escape_cell, heading)), " | ".join(rules)]
    lines += [" | ".join(map(escape_cell, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
