"""`gkd chat`: what is asked, and of whom."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gkd.commands.chat.columns import answer_all
from gkd.commands.chat.speakers import NAMES, Manner, Speaker, Turns, load_speakers

HINT = "a line asks all of them; /new begins anew, /quit or Ctrl-D ends"


@dataclass(frozen=True)
class Order:
    """What a user wants.

    Attributes:
        run: a run's output folder, or a checkpoint.
        ask: questions, each a chat of its own; () talks.
        system: the system turn, or None. teacher: another one than the run's.
        models: which of NAMES, by commas.
        manner: of writing.
        as_json: show nothing, for `ask`. trust_remote_code: let the models' own code run.
    """

    run: Path
    ask: tuple[str, ...] = ()
    system: str | None = None
    teacher: str | None = None
    models: str = ",".join(NAMES)
    manner: Manner = Manner()
    as_json: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        strange = [name for name in self.names if name not in NAMES]
        if strange or not self.names:
            raise ValueError(f"--models {self.models}: use {', '.join(NAMES)}, with commas between them")
        if self.teacher is not None and "teacher" not in self.names:
            raise ValueError(f"--teacher {self.teacher} has no effect with --models {self.models}: leave it out")
        if self.manner.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {self.manner.max_new_tokens}: use a whole number of at least 1")
        if not 0 <= self.manner.temperature < math.inf:
            raise ValueError(f"--temperature {self.manner.temperature}: 0 is greedy, 1 samples as in training")
        if self.as_json and not self.ask:
            raise ValueError("--json needs questions: --ask TEXT")

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return [name.strip() for name in self.models.split(",") if name.strip()]


def chat(order: Order, console: Console, notes: Console) -> list[dict[str, Any]]:
    """Ask, or talk until the user ends it; what is loaded is told on `notes`.

    Returns:
        Each question of `ask`, with the answers by name.
    """
    speakers = load_speakers(
        order.run,
        order.names,
        teacher=order.teacher,
        trust_remote_code=order.trust_remote_code,
        say=lambda text: notes.print(text, style="dim", markup=False, highlight=False),
    )
    if not order.ask:
        _talk(order, speakers, console, notes)
    found = []
    for question in order.ask:
        turns = [*_first(order), {"role": "user", "content": question}]
        if not order.as_json:
            console.print(f"> {question}", markup=False, highlight=False, soft_wrap=True)
        answers = answer_all(speakers, [turns] * len(speakers), order.manner, console, order.as_json)
        said = {one.name: dataclasses.asdict(answer) for one, answer in zip(speakers, answers, strict=True)}
        found.append({"ask": question, "answers": said})
    return found


def _first(order: Order) -> Turns:
    return [] if order.system is None else [{"role": "system", "content": order.system}]


def _talk(order: Order, speakers: list[Speaker], console: Console, notes: Console) -> None:
    """Each model goes on with the chat that it has had itself."""
    if console.is_terminal:
        notes.print(HINT, style="dim")
    chats = [_first(order) for _ in speakers]
    for line in _lines(console):
        if line == "/quit":
            break
        if line == "/new":
            chats = [_first(order) for _ in speakers]
        elif line:
            for turns in chats:
                turns.append({"role": "user", "content": line})
            answers = answer_all(speakers, chats, order.manner, console)
            for turns, answer in zip(chats, answers, strict=True):
                turns.append({"role": "assistant", "content": answer.text})


def _lines(console: Console) -> Iterator[str]:
    while True:
        try:
            yield console.input("> " if console.is_terminal else "", markup=False).strip()
        except EOFError:
            return
