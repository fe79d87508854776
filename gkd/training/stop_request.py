"""`StopRequest`: a signal asks for a stop, and the training ends where nothing is lost.

SIGTERM and SIGINT ask: the optimizer step is finished, or an evaluation left at the next batch; a checkpoint is
saved, and `train` raises `TrainingStopped`, which ends the program with 128 + the signal's number. A second one ends
it at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher hands on to its ranks a signal that the terminal or the scheduler has already sent them.
_ECHO_SECONDS = 5.0


class StopRequest:
    """While it is entered, the first signal is remembered and the second ends the process.

    Only in the main thread, and only where the program has no handler of its own.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        name = signal.Signals(number).name
        if self.signum is None:
            self.signum, self._since = number, now
            self.write_line(f"{name}: finishing this step, then saving; once more ends it at once\n")
        elif now - self._since > (_ECHO_SECONDS if "LOCAL_RANK" in os.environ else 0.0):
            self.write_line(f"{name} again: ending without a checkpoint\n")
            os._exit(128 + number)

    @staticmethod
    def write_line(text: str) -> None:
        """Not print or logging: the handler may have interrupted one of them."""
        if os.environ.get("RANK", "0") == "0":
            start = "\n" if os.isatty(2) else ""  # the line may hold a progress bar
            os.write(2, (start + text).encode())
