"""Runs as processes of their own, some at a time; what a failed one said last."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gkd.commands.sweep.plan import Run
from gkd.common.redact import harmless
from gkd.common.text import duration
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


def run_all(
    runs: Sequence[Run],
    command: Callable[[Run], list[str]],
    on_end: Callable[[Ended], None],
    *,
    jobs: int,
    environment: Mapping[str, str],
    meanwhile: Callable[[Mapping[Run, float]], None] = lambda going: None,
) -> None:
    """Run them, `jobs` at a time, in their order. None outlives this process, however it ends (on Linux).

    `meanwhile` is told many times a second which runs are going on, and for how many seconds.
    """
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
            now = time.monotonic()
            meanwhile({one.run: now - one.since for one in going})
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
