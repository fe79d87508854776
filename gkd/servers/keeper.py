"""Keeps one server process of a run: starts it, starts it again when it dies, ends it with the run.

Run as a script of its own, which imports nothing but the standard library:

    python keeper.py LOG ENDED RESTARTS COMMAND ...

It stands in a session of its own, so that Ctrl-C in the terminal reaches the run alone, and looks after whose child
it is: when the run is gone, however it went (SIGKILL included), the server and all that it started go, too. SIGUSR1
says that the server has been of use; only then a death is worth another start, as a wrong flag would repeat. What it
died of for good stands in the file ENDED, where every process of the run can see it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.2
TERM_SECONDS = 20.0  # for an end in order; then SIGKILL


class Keeper:
    """One server and its starts."""

    def __init__(self, log: str, ended: str, restarts: int, command: list[str]) -> None:
        self.log, self.ended, self.restarts, self.command = log, ended, restarts, command
        self.run = os.getppid()
        self.stopping = self.useful = False
        self.child: subprocess.Popen[bytes] | None = None

    def keep(self) -> int:
        """Until the run stops it or is gone, or the server has died for good."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGUSR1, self._useful)
        while True:
            with open(self.log, "ab") as file:
                self.child = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
            while self.child.poll() is None and not self._over():
                time.sleep(POLL_SECONDS)
            code = self.child.poll()
            self._end_group()
            if self._over():
                return 0
            if not self.useful or self.restarts == 0:
                with open(self.ended, "w") as file:
                    file.write(f"it ended with status {code}")
                return 1
            self.restarts -= 1
            with open(self.log, "a") as file:
                file.write(
                    f"\n--- it ended with status {code}: it is started again, {self.restarts} more times at most\n"
                )

    def _over(self) -> bool:
        return self.stopping or os.getppid() != self.run

    def _end_group(self) -> None:
        """The server and what it has started, which may outlive it."""
        assert self.child is not None
        for sent in (signal.SIGTERM, signal.SIGKILL):
            self._signal_group(sent)
            end = time.monotonic() + TERM_SECONDS
            while time.monotonic() < end and self._signal_group(0):
                self.child.poll()
                time.sleep(POLL_SECONDS / 4)

    def _signal_group(self, sent: int) -> bool:
        """Whether anything of the group was there to get the signal."""
        assert self.child is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, sent)
            return True
        return False

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _useful(self, *_: object) -> None:
        self.useful = True


if __name__ == "__main__":
    sys.exit(Keeper(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]).keep())
