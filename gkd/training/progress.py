"""One tidy progress bar: step, loss, realised lambda, tokens per second, time left. The rest goes to loggers.

Where there is no terminal (a log file, a job's output), a line for each log instead, which a file can hold.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from gkd.common.sign_of_life import SignOfLife


class ProgressBar(TrainerCallback):
    """Replaces the Trainer's console output, which prints every metric of every log.

    While the bar is there, log messages and warnings are written above it. `close` ends it, whatever ended the
    training.
    """

    def __init__(self) -> None:
        self._sign: SignOfLife | None = None
        self._evaluating: SignOfLife | None = None
        self._open = ExitStack()
        self._began = (0, 0.0)  # step and time
        self._logged = (0, 0.0)  # tokens and time

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        now = time.perf_counter()
        tokens = next((entry["num_tokens"] for entry in reversed(state.log_history) if "num_tokens" in entry), 0)
        self._began, self._logged = (state.global_step, now), (tokens, now)
        sign = SignOfLife("training", state.max_steps, "step", done=state.global_step, leave=True)
        self._sign = self._open.enter_context(sign)

    @property
    def bar(self) -> Any:
        """None where there is no terminal."""
        return None if self._sign is None else self._sign.bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._sign is not None:
            self._sign.tick(state.global_step - self._sign.done)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches: Any = kwargs.get("eval_dataloader")
        if self._sign is None:
            return
        if self._evaluating is None:
            total = len(batches) if hasattr(batches, "__len__") else None
            self._evaluating = self._open.enter_context(SignOfLife("evaluating", total, "batch"))
        self._evaluating.tick()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._evaluating is not None:
            self._evaluating.close()
            self._evaluating = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._sign is None or not logs or "loss" not in logs:
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
        self._sign.said()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is and give the console back."""
        self._open.close()
        self._sign = self._evaluating = None


def close_bars(callbacks: Iterable[Any]) -> None:
    """Close the progress bars among a trainer's callbacks."""
    for callback in callbacks:
        if isinstance(callback, ProgressBar):
            callback.close()
