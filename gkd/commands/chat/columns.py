"""Answers on the terminal as they are written, one column a model; or as plain text for a file or a program."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gkd.commands.chat.speakers import Answer, Manner, Speaker, Turns
from gkd.common.text import printable


def answer_all(
    speakers: Sequence[Speaker], chats: Sequence[Turns], manner: Manner, console: Console, quiet: bool = False
) -> list[Answer]:
    """Let all of them answer, one after the other, and show it.

    Args:
        speakers: in the order of the columns. chats: what each one reads.
        manner: of writing.
        console: a terminal sees the columns grow. quiet: nothing is shown.
    """
    answers: list[Answer] = []
    if quiet or not console.is_terminal:
        for speaker, chat in zip(speakers, chats, strict=True):
            answers.append(speaker.answer(chat, manner))
            if not quiet:
                said = f"[{speaker.name}] {printable(answers[-1].text)}  {_told(answers[-1])}"
                console.print(Text(said), soft_wrap=True)
        return answers
    texts, notes = [""] * len(speakers), [""] * len(speakers)
    with Live(_table(speakers, texts, notes), console=console, refresh_per_second=8) as live:
        for i, (speaker, chat) in enumerate(zip(speakers, chats, strict=True)):

            def grow(piece: str, i: int = i) -> None:
                texts[i] += piece
                live.update(_table(speakers, texts, notes))

            answers.append(speaker.answer(chat, manner, grow))
            texts[i], notes[i] = answers[-1].text, _told(answers[-1])
            live.update(_table(speakers, texts, notes), refresh=True)
    return answers


def _told(answer: Answer) -> str:
    return f"({answer.tokens} tokens{'' if answer.ended else ', cut off'})"


def _table(speakers: Sequence[Speaker], texts: Sequence[str], notes: Sequence[str]) -> Table:
    out = Table(expand=True, show_footer=any(notes))
    for speaker, note in zip(speakers, notes, strict=True):
        out.add_column(speaker.name, footer=Text(note, style="dim"), ratio=1)
    out.add_row(*(Text(printable(text)) for text in texts))
    return out
