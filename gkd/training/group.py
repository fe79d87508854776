"""`Group`: the windows of consecutive optimizer steps that one rollout writes for (`rollout_every`).

All of a group is decided when its first step begins: rows, sources, and completions from the weights of that step. A
checkpoint inside a group keeps what is still to be trained on, each rank its own file, so that a resumed run goes on
with the very sequences.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gkd.data.sequences import TokenSequence
from gkd.training.window import Window

logger = logging.getLogger(__name__)

NAME = "pending_rollouts_{rank}.json"


@dataclass
class Group:
    """Steps `first`, `first + 1`, ... on this rank.

    Attributes:
        windows: one for each step. sources: of each window's rows, over all ranks.
        written: each window's sequences with their completions; empty before the rollout.
        age: of the weights that sampled them when the first step began, in steps.
    """

    first: int
    windows: list[Window]
    sources: list[list[str]]
    written: list[list[TokenSequence]] = field(default_factory=list)
    age: int = 0

    def holds(self, step: int) -> bool:
        """Whether a step is of this group."""
        return self.first <= step < self.first + len(self.windows)

    def opened(self, step: int) -> tuple[Window, list[str]]:
        """A step's window and the sources of its rows."""
        return self.windows[step - self.first], self.sources[step - self.first]

    def as_one(self) -> tuple[Window, list[str]]:
        """All of it as one window, whose rows are numbered through: what a rollout is asked for."""
        if len(self.windows) == 1:
            return self.windows[0], self.sources[0]
        whole = Window([], [], [], 0)
        for window in self.windows:
            whole.sequences += window.sequences
            whole.indices += [whole.total + index for index in window.indices]
            whole.total += window.total
        return whole, [source for sources in self.sources for source in sources]

    def take(self, written: list[TokenSequence], age: int) -> None:
        """What the rollout has given for `as_one`."""
        sizes = [len(window.sequences) for window in self.windows]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.written = [written[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        self.age = age

    def from_step(self, step: int, most: int | None = None) -> Group:
        """What is left of it when a step begins; at most so many windows."""
        places = slice(step - self.first, None if most is None else step - self.first + most)
        age = self.age + step - self.first
        return Group(step, self.windows[places], self.sources[places], self.written[places], age)


def write(folder: str, group: Group, rank: int, ranks: int) -> None:
    """Into a checkpoint that is being written; one file for each rank."""
    with open(Path(folder) / NAME.format(rank=rank), "w", encoding="utf-8") as file:
        json.dump({"ranks": ranks, **asdict(group)}, file)


def read(checkpoint: str, rank: int, ranks: int) -> Group | None:
    """What a checkpoint keeps of a group; None of one that was saved between two groups.

    Raises:
        ValueError: it cannot be read.
    """
    path = Path(checkpoint) / NAME.format(rank=rank)
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        saved_by = state.pop("ranks")
        windows, written = state.pop("windows"), state.pop("written")
        group = Group(
            windows=[_window(window) for window in windows], written=[_sequences(rows) for rows in written], **state
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {path} cannot be gone on from ({error}): go on from another checkpoint"
        ) from error
    if saved_by != ranks:
        logger.warning("%s is of %s ranks, not of %s: its completions are written anew", path, saved_by, ranks)
        return None
    return group


def _window(state: dict[str, Any]) -> Window:
    sequences, fillers = _sequences(state.pop("sequences")), _sequences(state.pop("fillers"))
    return Window(sequences=sequences, fillers=fillers, **state)


def _sequences(rows: Iterable[dict[str, Any]]) -> list[TokenSequence]:
    return [TokenSequence(**row) for row in rows]
