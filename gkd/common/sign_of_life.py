"""A sign of life from what takes long: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

FIRST, MOST = 10.0, 60.0  # seconds of silence before the first line, and between lines later: 10, 20, 40, 60, 60, ...
_LOOK = 1.0  # how often, in seconds
_SHORT = 2.0  # what is over sooner gets no bar, unless it counts something


class Silence:
    """When to say something though nothing has happened: after 10 seconds, 20 more, 40 more, then every minute."""

    def __init__(self) -> None:
        self._heard, self._patience = time.monotonic(), FIRST

    def said(self) -> None:
        """Something has been shown, so that the silence begins anew."""
        self._heard, self._patience = time.monotonic(), FIRST

    def is_long(self) -> bool:
        """Whether it has lasted too long; if so it is taken to be broken now, and may last longer the next time."""
        now = time.monotonic()
        if now - self._heard < self._patience:
            return False
        self._heard, self._patience = now, min(2 * self._patience, MOST)
        return True


_open: list[SignOfLife] = []  # the innermost last: it alone writes lines


def on_terminal() -> bool:
    """Whether bars can be drawn: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel: that libraries import its package is no sign of it."""
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is not None and bool(kernel.IPKernelApp.initialized())


@contextmanager
def above_the_bars() -> Iterator[None]:
    """What is printed to stdout inside stands above the bars that are drawn now."""
    if not any(sign.bar is not None for sign in _open):
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        yield


class SignOfLife:
    """While it is open, whoever watches sees that something is being done, for how long, and how far it is.

    The main process alone says so, on stderr. A thread looks at the clock, so a single long call is no silence.

    Args:
        what: is done.
        total: how many there are to do; None where that is not known.
        unit: of what is counted, "" where nothing is.
        done: how many of them have been done before.
        leave: whether the bar stays when it is over.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str = "", *, done: int = 0, leave: bool = False
    ) -> None:
        self.what, self.total, self.unit, self.done, self.leave = what, total, unit, done, leave
        self.bar: Any = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._silence = Silence()
        self._draws = False
        self._around = ExitStack()

    def __enter__(self) -> SignOfLife:
        self._began = time.monotonic()
        self._silence.said()
        if os.environ.get("RANK", "0") != "0":
            return self
        self._draws = on_terminal()
        if self._draws:
            if not _open:
                _write_above(self._around)
            if self.unit:
                self.bar = self._new_bar()
        _open.append(self)
        self._thread = threading.Thread(target=self._watch, name=f"sign of life: {self.what}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """It is over."""
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        self._thread = None
        _open.remove(self)
        for outer in _open[-1:]:
            outer.said()
        if self.bar is not None:
            self.bar.close()
        self._around.close()

    def tick(self, number: int = 1) -> None:
        """So many more have been done."""
        self.done += number
        if self.bar is not None:
            self.bar.update(number)

    def said(self) -> None:
        """Something else has been shown, so that the silence begins anew."""
        self._silence.said()

    def line(self, seconds: float) -> str:
        """What is said where there is no bar."""
        after = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
        if not self.unit:
            return f"{self.what}: {after} so far"
        of = "" if self.total is None else f" of {self.total:,}"
        units = f"{self.unit}{'es' if self.unit.endswith('ch') else 's'}"
        return f"{self.what}: {self.done:,}{of} {units} after {after}"

    def _new_bar(self) -> Any:
        from tqdm.auto import tqdm

        return tqdm(
            desc=None if self.leave else self.what,
            total=self.total,
            initial=self.done,
            unit=self.unit or "it",
            leave=self.leave,
            dynamic_ncols=True,
            bar_format=None if self.unit else "{desc}: {elapsed}",
        )

    def _watch(self) -> None:
        while not self._over.wait(_LOOK):
            now = time.monotonic()
            if self._draws:
                if self.bar is None and now - self._began >= _SHORT:
                    self.bar = self._new_bar()
                elif self.bar is not None:
                    self.bar.refresh()
            elif _open[-1] is self and self._silence.is_long():
                print(self.line(now - self._began), file=sys.stderr, flush=True)


def _write_above(stack: ExitStack) -> None:
    """Until the stack is closed, log messages and warnings clear the bar first and draw it again under them."""
    from tqdm.contrib import DummyTqdmFile

    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in [handler for owner in loggers for handler in getattr(owner, "handlers", ())]:
        # The class itself: a subclass may choose its stream anew each time, and then refuses another.
        if type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.stdout):
            stack.callback(handler.setStream, handler.stream)
            handler.setStream(DummyTqdmFile(handler.stream))
    logging.captureWarnings(True)
    stack.callback(logging.captureWarnings, False)
