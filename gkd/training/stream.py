"""The windows of an epoch: taken from its iterator, opened, and asked for one step ahead where that is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gkd.data.sequences import PaddingCollator, TokenSequence, as_sequences
from gkd.data.sources import choose_sources
from gkd.training.window import Window, open_window, prompts_of, write_completions

Batches = list[list[TokenSequence]]


class WindowStream:
    """Windows in their order. With `rollout_staleness=1` the server writes the next one while this one is trained.

    The rows that are looked at ahead are kept for the step that trains on them; nothing of it is in a checkpoint. A
    resumed run asks anew, and so does every epoch's first window: both are sampled from the present weights.

    Args:
        trainer: its state tells the step, its rollouts write ahead, its log gets how old their weights were.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._args, self._accelerator = trainer, trainer.args, trainer.accelerator
        self._looked_at: tuple[Iterator[Any], Batches, bool] | None = None
        self._is_training = False

    @contextmanager
    def around(self) -> Iterator[None]:
        """A training happens inside; a request that was made ahead ends with it."""
        self._looked_at, self._is_training = None, True
        try:
            yield
        finally:
            self._is_training = False
            self.forget()

    def forget(self) -> None:
        """Give up what was looked at, and asked for, ahead."""
        self._looked_at = None
        for rollout in self._trainer.rollouts.values():
            rollout.forget()

    @contextmanager
    def rows_as_sequences(self) -> Iterator[None]:
        """Inside, a data loader of the training rows is made. That of a training gives token sequences, since most of
        them go into a rollout; who asks for one outside of it gets padded batches, as of any Trainer. A collator of
        the user's own is taken as it is."""
        trainer, collator = self._trainer, self._trainer.data_collator
        if self._is_training and type(collator) is PaddingCollator:
            trainer.data_collator = collator.sequences
        try:
            yield
        finally:
            trainer.data_collator = collator

    def next_window(self, iterator: Iterator[Any], number: int) -> tuple[Window, list[str]] | None:
        """The window that is to be trained now and its rows' sources; None at the end of an epoch."""
        held, self._looked_at = self._looked_at, None
        if held is not None and held[0] is iterator:
            return self._open(*held[1:], step=self._trainer.state.global_step)
        return self._open(*self._fetch(iterator, number), step=self._trainer.state.global_step)

    def write(self, window: Window, sources: list[str]) -> list[TokenSequence]:
        """The window's sequences with their completions written; see `write_completions`. Logs how old the weights
        were that a server sampled them from, in optimizer steps; what it says of its tokens is compared while they are
        trained on."""
        trainer, rollout = self._trainer, self._trainer.rollouts["student"]
        step = trainer.state.global_step
        written = write_completions(window, sources, trainer.rollouts, step, trainer.hygiene)
        if rollout.server_field is not None and "student" in sources:
            assert rollout.age in (0, self._args.rollout_staleness), rollout.age
            trainer._metrics["train"]["rollout/staleness"].append(float(rollout.age))
            if trainer.rollout_check is not None:
                trainer.rollout_check.open(len(window.sizes), rollout.age)
        return written

    def ask_ahead(self, iterator: Iterator[Any]) -> None:
        """Ask the server for the student's completions of the next window; they are sampled while this one trains."""
        step, rollout = self._trainer.state.global_step + 1, self._trainer.rollouts["student"]
        if self._args.rollout_staleness == 0 or step >= self._trainer.state.max_steps:
            return
        self._looked_at = (iterator, *self._fetch(iterator, self._args.gradient_accumulation_steps))
        opened = self._open(*self._looked_at[1:], step=step)
        if opened is not None and "student" in opened[1]:
            _, prompts, numbers = prompts_of(*opened, "student")
            with self._trainer.scheduled.sampling_of(step):
                rollout.generate_ahead(prompts, step, numbers)

    def compare_rollouts(self) -> None:
        """Behind each micro-batch, before its backward pass: after the step's last one the ranks compare."""
        compared = None if self._trainer.rollout_check is None else self._trainer.rollout_check.close()
        if compared is not None:
            self._trainer._metrics["train"]["rollout/logprob_gap"].append(compared.gap)
            self._trainer._metrics["train"]["rollout/surprise"].append(compared.surprise)

    def _fetch(self, iterator: Iterator[Any], number: int) -> tuple[Batches, bool]:
        """The next batches, and whether the epoch ends with them."""
        batches: Batches = []
        ended = False
        while len(batches) < number and not ended:
            batch = next(iterator, None)
            if batch is None:
                break
            batches.append(as_sequences(batch))
            ended = self._accelerator.gradient_state.end_of_dataloader
        return batches, ended

    def _open(self, batches: Batches, ended: bool, step: int) -> tuple[Window, list[str]] | None:
        if not batches:
            return None
        args, accelerator = self._args, self._accelerator
        last = self._rows_of_last_round(len(batches[-1])) if ended else None
        window = open_window(batches, accelerator.process_index, accelerator.num_processes, last)
        sources = choose_sources(
            args.seed, step, window.total, self._trainer.scheduled.lmbda(step), args.seq_kd, args.mixing
        )
        return window, sources

    def _rows_of_last_round(self, size: int) -> int | None:
        """Rows that the ranks' last batches of an epoch hold together, without those that accelerate repeats to make
        them as large as the others (`size` rows); None when there are none of those."""
        ranks, config = self._accelerator.num_processes, self._args.accelerator_config
        if ranks == 1 or self._args.dataloader_drop_last or not config.even_batches:
            return None
        rows = len(self._trainer.train_dataset) if hasattr(self._trainer.train_dataset, "__len__") else 0
        return rows % (ranks * size) or None
