"""The windows of an epoch: taken from its iterator, opened, written for in groups, and asked for one step ahead where
that is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gkd.data.sequences import PaddingCollator, TokenSequence, as_sequences
from gkd.data.sources import choose_sources
from gkd.training import group as groups
from gkd.training.going_on import all_ranks
from gkd.training.group import Group
from gkd.training.window import Window, open_window, prompts_of, write_completions

Batches = list[list[TokenSequence]]


class WindowStream:
    """Windows in their order, in groups of `rollout_every` that one rollout writes for. A group ends with its epoch,
    and with the training; a checkpoint keeps what is left of it (`gkd.training.group`).

    With `rollout_staleness=1` the server writes the next window while this one is trained. The rows that are looked at
    ahead are kept for the step that trains on them; nothing of it is in a checkpoint. A resumed run asks anew, and so
    does every epoch's first window: both are sampled from the present weights.

    Args:
        trainer: its state tells the step, its rollouts write ahead, its log gets how old their weights were.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._args, self._accelerator = trainer, trainer.args, trainer.accelerator
        self._looked_at: tuple[Iterator[Any], Batches, bool] | None = None
        self._group: Group | None = None
        self._of: Iterator[Any] | None = None  # whose windows the group holds; None of one from a checkpoint
        self._is_training = False

    @contextmanager
    def around(self, checkpoint: str | None = None) -> Iterator[None]:
        """A training happens inside, which goes on from a checkpoint; a request that was made ahead ends with it."""
        self.forget()
        self.resume(checkpoint)
        self._is_training = True
        try:
            yield
        finally:
            self._is_training, self._of = False, None
            self._forget_ahead()  # and no more: a training that a server ends is saved behind this, with its group

    def forget(self) -> None:
        """Give up what was looked at, and asked for, ahead, and what is left of a group."""
        self._group = self._of = None
        self._forget_ahead()

    def _forget_ahead(self) -> None:
        self._looked_at = None
        for rollout in self._trainer.rollouts.values():
            rollout.forget()

    def resume(self, checkpoint: str | None) -> None:
        """Go on with what a checkpoint keeps of a group, unless it is no longer wanted. All ranks call this.

        Raises:
            ValueError: it cannot be read, on all ranks.
        """
        if checkpoint is None or self._args.rollout_every == 1 or self._args.ignore_data_skip:  # of other rows
            return
        accelerator = self._accelerator
        kept: list[Group | None] = []
        where = (checkpoint, accelerator.process_index, accelerator.num_processes)
        all_ranks(accelerator, lambda: kept.append(groups.read(*where)))
        self._group = kept[0]

    def save(self, folder: str) -> None:
        """Keep what is left of the group in a checkpoint: what the step that comes next is to train on, and those
        behind it."""
        step, group, accelerator = self._trainer.state.global_step, self._group, self._accelerator
        if self._args.rollout_every > 1 and group is not None and group.written and group.holds(step):
            groups.write(folder, group.from_step(step), accelerator.process_index, accelerator.num_processes)

    @contextmanager
    def rows_as_sequences(self) -> Iterator[None]:
        """Inside, a data loader of the training rows is made. That of a training gives token sequences, since most of
        them go into a rollout; who asks for one outside of it gets padded batches, as of any Trainer. A collator of
        the user's own is taken as it is."""
        trainer, collator, size = self._trainer, self._trainer.data_collator, self._trainer._train_batch_size
        if self._is_training:
            trainer._train_batch_size = size // self._args.num_completions  # each of its rows is several in a window
            if type(collator) is PaddingCollator:
                trainer.data_collator = collator.sequences
        try:
            yield
        finally:
            trainer.data_collator, trainer._train_batch_size = collator, size

    def next_window(self, iterator: Iterator[Any], number: int) -> tuple[Window, list[str]] | None:
        """The window that is to be trained now and its rows' sources; None at the end of an epoch."""
        step, held = self._trainer.state.global_step, self._group
        if held is None or not held.holds(step) or self._of is not iterator:
            goes_on = held is not None and self._of is None and held.holds(step)
            self._group = self._resumed(iterator, number) if goes_on else self._begun(iterator, number)
            self._of = iterator
        return None if self._group is None else self._group.opened(step)

    @property
    def sampled_at(self) -> int:
        """The step whose sampling the present window's completions have: the first of its group."""
        group = self._group
        assert group is not None
        return group.first - (group.age if group.written else 0)

    def _begun(self, iterator: Iterator[Any], number: int) -> Group | None:
        """The group that begins with this step; None at the end of an epoch."""
        held, self._looked_at = self._looked_at, None
        first = self._trainer.state.global_step
        if held is not None and held[0] is iterator:
            fetched = [held[1:]] if held[1] else []
        else:
            most = min(self._args.rollout_every, self._trainer.state.max_steps - first)
            fetched = self._fetch_windows(iterator, number, most)
        opened = [self._open(*batches, step) for step, batches in enumerate(fetched, start=first)]
        return Group(first, [window for window, _ in opened], [sources for _, sources in opened]) if opened else None

    def _resumed(self, iterator: Iterator[Any], number: int) -> Group | None:
        """What is left of the group of a checkpoint, whose rows come from the iterator once more."""
        assert self._group is not None
        step = self._trainer.state.global_step
        left = self._group.from_step(step)
        found = len(self._fetch_windows(iterator, number, len(left.windows)))
        return left.from_step(step, found) if found else None

    def _fetch_windows(self, iterator: Iterator[Any], number: int, most: int) -> list[tuple[Batches, bool]]:
        """The batches of the next windows of the epoch, and whether the epoch ends with them: the first window's and
        up to `most` in all."""
        found: list[tuple[Batches, bool]] = []
        while not found or (len(found) < most and not found[-1][1]):
            batches, ended = self._fetch(iterator, number)
            if not batches:
                break
            found.append((batches, ended))
            number = self._args.gradient_accumulation_steps
        return found

    def write(self) -> list[TokenSequence]:
        """The present window's sequences with their completions written, with all of its group's; see
        `write_completions`. Logs how old the weights were that sampled them, in optimizer steps; what a server says of
        its tokens is compared while they are trained on."""
        trainer, rollout, group = self._trainer, self._trainer.rollouts["student"], self._group
        assert group is not None
        step = trainer.state.global_step
        window, sources = group.opened(step)
        if not group.written:
            group.take(write_completions(*group.as_one(), trainer.rollouts, step, trainer.hygiene), rollout.age)
            assert group.age in (0, self._args.rollout_staleness), group.age
        age = group.age + step - group.first
        told = rollout.server_field is not None or self._args.rollout_every > 1
        if told and "student" in sources:
            trainer._metrics["train"]["rollout/staleness"].append(float(age))
            if trainer.rollout_check is not None:
                trainer.rollout_check.open(len(window.sizes), age)
        return group.written[step - group.first]

    def ask_ahead(self, iterator: Iterator[Any]) -> None:
        """Ask the server for the student's completions of the next window; they are sampled while this one trains."""
        step, rollout = self._trainer.state.global_step + 1, self._trainer.rollouts["student"]
        if self._args.rollout_staleness == 0 or step >= self._trainer.state.max_steps:
            return
        if self._group is not None and self._group.holds(step):  # of a checkpoint
            return
        self._looked_at = (iterator, *self._fetch(iterator, self._args.gradient_accumulation_steps))
        if not self._looked_at[1]:
            return
        opened = self._open(*self._looked_at[1:], step)
        if "student" in opened[1]:
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
            batches.append([row for row in as_sequences(batch) for _ in range(self._args.num_completions)])
            ended = self._accelerator.gradient_state.end_of_dataloader
        return batches, ended

    def _open(self, batches: Batches, ended: bool, step: int) -> tuple[Window, list[str]]:
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
        return rows * self._args.num_completions % (ranks * size) or None
