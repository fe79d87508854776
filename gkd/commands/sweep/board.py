"""The progress of a sweep on the screen or in a log: runs done, which ones are going on, and the time that is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gkd.commands.sweep.plan import Run
from gkd.common.sign_of_life import Silence
from gkd.common.text import rough_duration, shorten

_DRAW_EVERY_S = 1.0


class Board:
    """The progress of a sweep: runs done and the time that is left, judged by those that have ended."""

    def __init__(self, console: Console, total: int, jobs: int) -> None:
        self._console, self._total, self._jobs = console, total, jobs
        self._durations: list[float] = []
        self._done = 0
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        # No thread of its own: processes are forked here.
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task = self._progress.add_task("runs", total=total, left="")
        self._silence, self._drawn = Silence(), 0.0

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        with self._progress:
            yield

    @property
    def left(self) -> str:
        rest = self._total - self._done
        if not rest or not self._durations:
            return ""
        mean = sum(self._durations) / len(self._durations)
        return f"about {rough_duration(mean * rest / self._jobs)} left"

    def advance(self, line: str, seconds: float | None = None) -> None:
        """A run is done; `seconds` that it took, None if it was done before."""
        self._done += 1
        if seconds is not None:
            self._durations.append(seconds)
        self._progress.update(self._task, advance=1, left=self.left)
        ahead = f"{self._done} of {self._total}" + (f", {self.left}" if self.left else "")
        self.say(f"{line} ({ahead})")
        self._progress.refresh()

    def look(self, going: Mapping[Run, float]) -> None:
        """These runs are going on, for so many seconds: the bar shows it, and where there is none a line now and then.

        To be called often."""
        if not going:
            return
        first, *others = (run.name for run in going)
        more = f" and {len(others)} more" if others else ""
        now = time.monotonic()
        if self._console.is_terminal and now - self._drawn >= _DRAW_EVERY_S:
            self._progress.update(self._task, description=shorten(first, 30) + more)
            self._progress.refresh()
            self._drawn = now
        elif not self._console.is_terminal and self._silence.is_long():
            longest = rough_duration(max(going.values()))
            self._print(f"running: {first}{more}, for {longest} ({self._done} of {self._total} done)")

    def say(self, text: str) -> None:
        self._print(text)
        self._silence.said()

    def _print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
