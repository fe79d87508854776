"""Sample completions during training: a table on the console, and the whole step's rows for the loggers.

They are the sequences of the optimizer step that has just been trained on, with the divergence that training itself
has computed, so they cost no sampling and no forward pass, and they move no random stream. Only the main process
shows its own rows: no communication.

TRL's `print_prompt_completions_sample` is not used: it prints whole texts, escape sequences of the terminal included,
and draws rows from Python's global random generator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tqdm.std import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from gkd.common.redact import redact_value
from gkd.common.text import printable, shorten
from gkd.data.last_turn import LastTurn
from gkd.data.sequences import TokenSequence
from gkd.report.markdown import markdown_table
from gkd.rollouts.hygiene import Hygiene

COLUMNS = ("step", "source", "prompt", "completion", "end", "tokens", "divergence")
SHOWN_CHARACTERS = 300  # of a prompt's end and of a completion, on the console
_ORDER = ("student", "teacher", "data")  # what was just written comes first


@dataclass(frozen=True)
class Sample:
    """One sequence of a step, as text. `end`: how the completion ends, and whether it was left out of the loss;
    `divergence`: nats per target token, None without a target or without a teacher; `question`: what the console shows
    of the prompt, "" = its end."""

    step: int
    source: str
    prompt: str
    completion: str
    end: str
    tokens: int
    divergence: float | None
    question: str = ""

    def as_row(self) -> list[Any]:
        """Its values in the order of COLUMNS."""
        return [getattr(self, name) for name in COLUMNS]


class CompletionLog(TrainerCallback):
    """Keeps the sequences of the last optimizer step and shows them every so many steps.

    Args:
        tokenizer: decodes.
        hygiene: gives what tells how a completion ends.
        callbacks: the trainer's callbacks, among which the loggers are looked for when there is something to show.
        every: show every so many steps; None = with every training log.
        number: rows on the console; the loggers get all rows of this process.
    """

    def __init__(
        self,
        tokenizer: Any,
        hygiene: Callable[[], Hygiene],
        callbacks: Callable[[], Sequence[Any]],
        every: int | None = None,
        number: int = 4,
    ) -> None:
        self._tokenizer, self._hygiene, self._callbacks = tokenizer, hygiene, callbacks
        self._every, self._number = every, number
        self._last_turn = LastTurn(tokenizer)
        self._sequences: list[TokenSequence] = []
        self._divergences: list[Tensor] = []

    # ------------------------------------------------------------------------------- what the trainer hands over

    def open(self, micro_batches: list[list[TokenSequence]]) -> None:
        """A step begins with these rows, in the order in which they will be trained on."""
        self._sequences = [sequence for rows in micro_batches for sequence in rows]
        self._divergences = []

    def add(self, divergence: Tensor) -> None:
        """The per-target divergence [N] of the next micro-batch; it stays on its device until it is shown."""
        self._divergences.append(divergence.detach())

    # ------------------------------------------------------------------------------------------------ callbacks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._every is not None and state.global_step % self._every == 0:
            self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # A training log of steps that trained on nothing has no loss.
        if self._every is None and not {"loss", "learning_rate"}.isdisjoint(logs or {}):
            self._show(state)

    def _show(self, state: Any) -> None:
        if not state.is_world_process_zero or not self._sequences:
            return
        samples = self.samples(state.global_step)
        if samples:
            print_samples(pick(samples, self._number))
            for callback in self._callbacks():
                send(callback, samples)
        self._sequences = []  # a step is shown once

    def samples(self, step: int) -> list[Sample]:
        """The last step's sequences as text, secrets replaced."""
        values = torch.cat(self._divergences).cpu() if self._divergences else None  # a step without a teacher
        samples, start = [], 0
        for sequence in self._sequences:
            targets = sequence.num_targets
            mean = float(values[start : start + targets].mean()) if targets and values is not None else None
            start += targets
            prompt = sequence.input_ids[: sequence.prompt_length]
            completion = sequence.input_ids[sequence.prompt_length :]
            if not completion:  # a filler, where a rank has fewer rows than places
                continue
            verdict = self._hygiene().judge(completion, sequence.source)
            names = {"cut off": verdict.truncated, "empty": verdict.empty, "repetitive": verdict.repetitive}
            found = [name for name, is_so in names.items() if is_so]
            found = found or ["ended" if verdict.ended else "no stop token"]
            end = ", ".join(found if targets else [*found, "not trained on"])
            texts = (self._text(prompt), self._text(completion))
            question = self._last_turn(texts[0])
            samples.append(Sample(step, sequence.source, *texts, end, len(completion), mean, question))
        assert values is None or start == len(values), (start, len(values))
        return samples

    def _text(self, ids: list[int]) -> str:
        """With the special tokens, which tell where a turn ends."""
        return redact_value(self._tokenizer.decode(ids))


def completion_log(
    args: Any, tokenizer: Any, hygiene: Callable[[], Hygiene], callbacks: Callable[[], Sequence[Any]]
) -> CompletionLog | None:
    """As the settings want it; None where nothing is to be shown."""
    if not args.log_completions:
        return None
    return CompletionLog(tokenizer, hygiene, callbacks, args.log_completions_steps, args.num_completions_to_print)


# --------------------------------------------------------------------------------------------------- the console


def pick(samples: Sequence[Sample], number: int) -> list[Sample]:
    """`number` samples, shared out among the sources and spread over the lengths, without drawing at random."""
    groups = [
        sorted(own, key=lambda sample: sample.tokens)
        for source in _ORDER
        if (own := [sample for sample in samples if sample.source == source])
    ]
    shares = [0] * len(groups)
    for _ in range(min(number, len(samples))):
        unfilled = [i for i, group in enumerate(groups) if shares[i] < len(group)]
        shares[min(unfilled, key=shares.__getitem__)] += 1
    return [
        group[(2 * i + 1) * len(group) // (2 * share)]
        for group, share in zip(groups, shares, strict=True)
        for i in range(share)
    ]


def samples_table(samples: Sequence[Sample], width: int) -> Table:
    """The samples for a console of `width` characters; on a narrow one, what is known of a row stands under it."""
    narrow = width < 72
    table = Table(title=f"Completions of step {samples[0].step}", title_justify="left", show_lines=True, width=width)
    if not narrow:
        table.add_column("Written by", no_wrap=True)
    table.add_column("Prompt (end)", ratio=1, overflow="fold")
    table.add_column("Completion", ratio=1 if narrow else 2, overflow="fold")
    for sample in samples:
        facts = [sample.source, f"{sample.tokens} tokens", *sample.end.split(", ")]
        if sample.divergence is not None:
            facts.append(f"{sample.divergence:.3f} nats")
        prompt, completion = (
            printable((sample.question or sample.prompt).strip("\n")),
            printable(sample.completion.strip("\n")),
        )
        if len(prompt) > SHOWN_CHARACTERS:
            prompt = "…" + prompt[1 - SHOWN_CHARACTERS :]
        texts = [Text(prompt), Text(shorten(completion, SHOWN_CHARACTERS))]
        if narrow:
            texts[1].append("\n" + ", ".join(facts), style="dim")
        else:
            texts.insert(0, Text("\n".join(facts)))
        table.add_row(*texts)
    return table


def print_samples(samples: Sequence[Sample]) -> None:
    """Print above a progress bar, where there is one."""
    console = Console()
    with tqdm.external_write_mode(file=sys.stdout):
        console.print(samples_table(samples, console.width))


# --------------------------------------------------------------------------------------------------- the loggers


def send(callback: Any, samples: Sequence[Sample]) -> None:
    """Hand the rows to a logger: a table for Weights & Biases and Trackio, text for TensorBoard; others have none."""
    rows = [sample.as_row() for sample in samples]
    if isinstance(callback, WandbCallback):
        import wandb

        if wandb.run is not None:
            table = wandb.Table(columns=list(COLUMNS), data=rows)
            wandb.log({"completions": table, "train/global_step": samples[0].step})
    elif isinstance(callback, TrackioCallback):
        import pandas
        import trackio

        frame = pandas.DataFrame(rows, columns=list(COLUMNS))
        trackio.log({"completions": trackio.Table(dataframe=frame), "train/global_step": samples[0].step})
    elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        callback.tb_writer.add_text("completions", markdown_table(COLUMNS, rows, "lllllrr"), samples[0].step)
