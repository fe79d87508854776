"""Runs as processes of their own, some at a time; progress; what a failed one said last."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gkd.commands.sweep.plan import Run
from gkd.common.redact import harmless
from gkd.common.text import duration, rough_duration
from gkd.training.output_folder import locked

TAIL_LINES = 5
_LOOK_EVERY_S = 0.1
_END_WITHIN_S = 20.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    run: Run
    code: int
    wall_seconds: float
    cpu_seconds: float  # of all its processes

    @property
    def last_words(self) -> list[str]:
        """The last lines of its log."""
        text = self.run.log.read_text(encoding="utf-8", errors="replace")
        return [harmless(line) for line in text.splitlines() if line.strip()][-TAIL_LINES:]


@dataclass
class _Going:
    run: Run
    process: subprocess.Popen[bytes]
    since: float


class Board:
    """The progress of a sweep: runs done and the time that is left, judged by those that have ended."""

    def __init__(self, console: Console, total: int, jobs: int) -> None:
        self._console, self._total, self._jobs = console, total, jobs
        self._durations: list[float] = []
        self._done = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        # No thread of its own: processes are forked here.
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task = self._progress.add_task("runs", total=total, left="")

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

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def run_all(
    runs: Sequence[Run],
    command: Callable[[Run], list[str]],
    on_end: Callable[[Ended], None],
    *,
    jobs: int,
    environment: Mapping[str, str],
) -> None:
    """Run them, `jobs` at a time, in their order. None outlives this process, however it ends (on Linux)."""
    waiting = list(runs)
    going: list[_Going] = []
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                run = waiting.pop(0)
                going.append(_start(run, command(run), environment))
            time.sleep(_LOOK_EVERY_S)
            for one in list(going):
                ended = _ended(one)
                if ended is not None:
                    going.remove(one)
                    on_end(ended)
    finally:
        _stop(going)


def _start(run: Run, command: list[str], environment: Mapping[str, str]) -> _Going:
    """Start a run in an empty folder: what an earlier attempt left is of no use to anyone."""
    clear(run.output)
    run.folder.mkdir(parents=True, exist_ok=True)
    with run.log.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=_end_with_the_parent if sys.platform.startswith("linux") else None,
        )
    return _Going(run, process, time.monotonic())


def _end_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def clear(folder: Path) -> None:
    """Delete a run's output, once no process of an earlier attempt works there any more.

    Raises:
        ValueError: one still does.
    """
    end = time.monotonic() + _END_WITHIN_S
    while folder.exists():
        try:
            with locked(str(folder)):
                shutil.rmtree(folder)
        except ValueError:
            if time.monotonic() > end:
                raise
            time.sleep(_LOOK_EVERY_S)


def _ended(one: _Going) -> Ended | None:
    pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
    if pid == 0:
        return None
    one.process.returncode = code = os.waitstatus_to_exitcode(status)
    return Ended(one.run, code, time.monotonic() - one.since, usage.ru_utime + usage.ru_stime)


def _stop(going: Sequence[_Going]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for one in going:
            if one.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.process.pid, number)
        for one in going:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(_END_WITHIN_S)


def told(ended: Ended) -> str:
    """How a run ended, in a line."""
    if ended.code == 0:
        return f"done: {ended.run.name}, {duration(ended.wall_seconds)}"
    how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
    return f"failed: {ended.run.name}, {how}"
