"""Trainings in forked children of one process that has imported everything: they start in no time, and may be killed.

The parent must not have run a backward pass: autograd's threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from gkd.servers.own import free_port

LIMIT_S = 300  # generous: the machine may be busy


class Child:
    """A forked process that runs `work(say)`; what it says comes line by line, its stderr goes to a file."""

    def __init__(self, work: Callable[[Callable[[str], None]], None], errors: Path, **environment: str) -> None:
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.errors = errors
        self.lines: list[str] = []
        self.code: int | None = None  # as shells have it: 128 + n for signal n
        self._read, self._rest = read, b""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
            os.environ.update(environment)
            gc.freeze()  # a training collects garbage in full: what the parent has imported is none
            os._exit(_result(work, lambda line: os.write(write, line.encode() + b"\n")))
        os.close(write)

    def wait_for(self, start: str = "") -> str | None:
        """The next line that starts so; None when it ended without one."""
        end = time.monotonic() + LIMIT_S
        while True:
            line = self._line(end)
            if line is None or line.startswith(start):
                return line

    def _line(self, end: float) -> str | None:
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.send(signal.SIGKILL)
                raise AssertionError(f"a child said nothing for too long\n{self.said()}")
            data = os.read(self._read, 65536)
            if not data:
                return None
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        self.lines.append(line.decode())
        return self.lines[-1]

    def send(self, number: int) -> None:
        """Send it a signal; it has not been waited for, so the number is its own."""
        assert self.code is None
        os.kill(self.pid, number)

    def join(self) -> int:
        """Its exit code, once it has ended."""
        if self.code is None:
            with contextlib.suppress(AssertionError):
                while self.wait_for() is not None:
                    pass
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.code = 128 - self.code if self.code < 0 else self.code
            os.close(self._read)
        return self.code

    def said(self) -> str:
        return self.errors.read_text(errors="replace")


def _result(work: Callable[[Callable[[str], None]], None], say: Callable[[str], object]) -> int:
    """Run it as a program would be run: SystemExit's code, 1 and a traceback for an error."""
    try:
        work(say)  # type: ignore[arg-type]
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 - the end of a process
        traceback.print_exc()
        return 1
    return 0


def ranks(work: Callable[[Callable[[str], None]], None], folder: Path, number: int = 2) -> list[Child]:
    """So many processes that find each other as if a launcher had started them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(number)}
    return [
        Child(work, folder / f"rank-{rank}.txt", **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(number)
    ]
