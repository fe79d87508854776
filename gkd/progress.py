"""One tidy progress bar: step, loss, realised lambda, tokens per second, time left. The rest goes to loggers."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """Replaces the Trainer's console output, which prints every metric of every log."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.start = 0.0
        self.tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)
            self.start, self.tokens_before = time.perf_counter(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        shown = {"loss": f"{float(logs['loss']):.4f}"}
        if "lmbda_realised" in logs:
            shown["λ"] = f"{logs['lmbda_realised']:.2f}"
        if "num_tokens" in logs:
            self.tokens_before = self.tokens_before or 0
            shown["tok/s"] = f"{logs['num_tokens'] / (time.perf_counter() - self.start):.0f}"
        self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
