"""One tidy progress bar: step, loss, realised lambda, tokens per second, time left. The rest goes to loggers.

Where there is no terminal (a log file, a job's output), a line for each log instead, which a file can hold.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib import DummyTqdmFile
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """Replaces the Trainer's console output, which prints every metric of every log.

    While the bar is there, log messages and warnings are written above it. `close` ends it, whatever ended the
    training.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self._lines = False
        self._open = ExitStack()
        self._began = (0, 0.0)  # step and time
        self._logged = (0, 0.0)  # tokens and time

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        now = time.perf_counter()
        tokens = next((entry["num_tokens"] for entry in reversed(state.log_history) if "num_tokens" in entry), 0)
        self._began, self._logged = (state.global_step, now), (tokens, now)
        self._lines = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        if not self._lines:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)
            self._open.callback(self.bar.close)
            _write_above(self._open)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if (self.bar is None and not self._lines) or not logs or "loss" not in logs:
            return
        shown = {"loss": f"{float(logs['loss']):.4f}"}
        if "lmbda_realised" in logs:
            shown["λ"] = f"{logs['lmbda_realised']:.2f}"
        now = time.perf_counter()
        if "num_tokens" in logs:  # of this logging period: a total would carry an evaluation's time along
            tokens, before = self._logged
            shown["tok/s"] = f"{(logs['num_tokens'] - tokens) / max(now - before, 1e-9):.0f}"
            self._logged = (logs["num_tokens"], now)
        if self.bar is not None:
            self.bar.set_postfix(shown)
            return
        step, began = self._began
        left = (now - began) / max(state.global_step - step, 1) * (state.max_steps - state.global_step)
        facts = ", ".join(f"{name} {value}" for name, value in shown.items())
        text = f"step {state.global_step}/{state.max_steps}: {facts}, {tqdm.format_interval(left)} left"
        print(text, file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is and give the console back."""
        self._open.close()
        self.bar, self._lines = None, False


def close_bars(callbacks: Iterable[Any]) -> None:
    """Close the progress bars among a trainer's callbacks."""
    for callback in callbacks:
        if isinstance(callback, ProgressBar):
            callback.close()


def _write_above(stack: ExitStack) -> None:
    """Until the stack is closed, log messages and warnings clear the bar first and draw it again under them."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in [handler for owner in loggers for handler in getattr(owner, "handlers", ())]:
        # The class itself: a subclass may choose its stream anew each time, and then refuses another.
        if type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.stdout):
            stack.callback(handler.setStream, handler.stream)
            handler.setStream(DummyTqdmFile(handler.stream))
    logging.captureWarnings(True)
    stack.callback(logging.captureWarnings, False)
