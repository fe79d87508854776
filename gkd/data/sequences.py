"""Token sequences: what a row has become, joined with a completion, cut, and padded to a batch.

Masks come from lengths, never from ids, so pad == eos changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gkd.data.sources import SOURCES
from gkd.data.targets import IGNORE, find_targets


@dataclass(frozen=True)
class PaddingCollator:
    """Prepared rows as token sequences, for a training, whose rollout comes before any tensor; or padded on the right
    to the longest, whatever side the tokenizer pads on, for an evaluation, which writes nothing.

    Called, it returns int64 tensors: `input_ids`, `attention_mask`, `labels` [B, T]; `prompt_lengths`, `rows`,
    `teachers` [B]; `prompt_ids` [B, P], -100 where there are none: the prompts that are no beginnings of their rows.
    """

    pad_id: int
    pad_to_multiple_of: int | None = None

    def sequences(self, features: list[Mapping[str, Any]]) -> list[TokenSequence]:
        """The rows as they are; `collate` makes tensors of what becomes of them."""
        return [
            TokenSequence(
                list(row["input_ids"]),
                list(row["labels"]),
                int(row["prompt_length"]),
                row=int(row["row"]),
                teacher=int(row.get("teacher", 0)),
                prompt_ids=list(row.get("prompt_ids") or ()),
            )
            for row in features
        ]

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = self.sequences(features)
        padded = collate(sequences, self.pad_id, self.pad_to_multiple_of)
        prompt_lengths = torch.tensor([sequence.prompt_length for sequence in sequences])
        names = ("input_ids", "attention_mask", "labels", "rows", "teachers")
        prompt_ids = [torch.tensor(sequence.prompt_ids, dtype=torch.long) for sequence in sequences]
        return {
            **{key: padded[key] for key in names},
            "prompt_lengths": prompt_lengths,
            "prompt_ids": pad_sequence(prompt_ids, batch_first=True, padding_value=IGNORE),
        }


_OF_ROWS = ("input_ids", "attention_mask", "labels", "prompt_lengths", "prompt_ids", "rows", "teachers")


@dataclass
class TokenSequence:
    """One row of a window: token ids, what is trained on, and where it came from.

    Attributes:
        input_ids: prompt and completion.
        labels: `input_ids` on trained tokens, `IGNORE` elsewhere; same length.
        prompt_length: tokens before the (last) completion.
        source: `"data"`, `"student"` or `"teacher"`.
        row: row number in the data set.
        truncated: the completion reached the cap without a stop token.
        teacher: number of the teacher that scores this row, of several (`teacher_adapters`).
        prompt_ids: what a rollout starts from where `input_ids[:prompt_length]` is not that, else empty.
        log_probs: what the server that sampled the completion says of its tokens; empty where nobody says it.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    source: str = "data"
    row: int = -1
    truncated: bool = False
    teacher: int = 0
    prompt_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        """What a rollout starts from."""
        return self.prompt_ids or self.input_ids[: self.prompt_length]

    @property
    def num_targets(self) -> int:
        return sum(label != IGNORE for label in self.labels[1:])

    @property
    def completion_length(self) -> int:
        return len(self.input_ids) - self.prompt_length


def prompt_of(row: Mapping[str, Any]) -> list[int]:
    """What a rollout starts from, of a prepared row (`gkd.data.prepare.prepare_dataset`)."""
    return list(row.get("prompt_ids") or row["input_ids"][: row["prompt_length"]])


def join(
    prompt: list[int],
    completion: list[int],
    source: str,
    row: int,
    *,
    truncated: bool = False,
    train: bool = True,
    teacher: int = 0,
) -> TokenSequence:
    """A sequence from a rollout: every token of the completion is trained on, or none when `train` is false."""
    labels = [IGNORE] * len(prompt) + (list(completion) if train else [IGNORE] * len(completion))
    return TokenSequence([*prompt, *completion], labels, len(prompt), source, row, truncated, teacher)


def as_sequences(batch: list[TokenSequence] | Mapping[str, Tensor]) -> list[TokenSequence]:
    """What a data loader of the training rows gives: sequences, or what a collator of the user's own has padded."""
    return batch if isinstance(batch, list) else unpad(batch)


def unpad(batch: Mapping[str, Tensor]) -> list[TokenSequence]:
    """Take a padded batch apart, row by row (any padding side).

    Without `prompt_lengths` (a foreign collator), the prompt is what stands before the first trained token.
    """
    # One transfer of each tensor, not one of each row.
    batch = {name: value.cpu() for name, value in batch.items() if name in _OF_ROWS}
    mask = batch["attention_mask"].bool()
    prompt_lengths = batch.get("prompt_lengths")
    prompts = batch["prompt_ids"].tolist() if "prompt_ids" in batch else [[]] * mask.shape[0]
    rows, teachers = batch.get("rows"), batch.get("teachers")
    sequences = []
    for index in range(mask.shape[0]):
        keep = mask[index]
        input_ids = batch["input_ids"][index][keep].tolist()
        labels = batch["labels"][index][keep].tolist()
        if prompt_lengths is not None:
            prompt_length = int(prompt_lengths[index])
        else:
            prompt_length = next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))
        row = int(rows[index]) if rows is not None else -1
        teacher = int(teachers[index]) if teachers is not None else 0
        prompt_ids = [i for i in prompts[index] if i != IGNORE]
        sequences.append(
            TokenSequence(input_ids, labels, prompt_length, "data", row, teacher=teacher, prompt_ids=prompt_ids)
        )
    return sequences


def cut(sequences: list[TokenSequence], sizes: Seq[int]) -> list[list[TokenSequence]]:
    """Sort by length, then cut into micro-batches of the given sizes, so that each pads to its own longest row only.

    Longest first: what does not fit into memory fails at once, and later micro-batches reuse the first one's blocks.

    Raises:
        AssertionError: the sizes do not add up to the number of sequences.
    """
    assert sum(sizes) == len(sequences), (sizes, len(sequences))
    ordered = sorted(sequences, key=lambda s: -len(s.input_ids))
    micro_batches, start = [], 0
    for size in sizes:
        micro_batches.append(ordered[start : start + size])
        start += size
    return micro_batches


def collate(sequences: list[TokenSequence], pad_id: int, multiple: int | None = None) -> dict[str, Tensor]:
    """Pad on the right to the longest row (rounded up to `multiple`).

    Returns:
        `input_ids`, `attention_mask`, `labels` [B, T], `sources`, `rows`, `teachers` [B] and the targets [N] (see
        `Targets`), all int64. A causal model's hidden states at real positions do not see padding on their right.
        `server_log_probs` [B, T] fp32, NaN where there are none, when any row has some.
    """
    longest = max(len(s.input_ids) for s in sequences)
    if multiple:
        longest = -(-longest // multiple) * multiple
    shape = (len(sequences), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        input_ids[i, :length] = torch.tensor(sequence.input_ids, dtype=torch.long)
        labels[i, :length] = torch.tensor(sequence.labels, dtype=torch.long)
        attention_mask[i, :length] = 1
    targets = find_targets(labels)
    batch: dict[str, Tensor] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "sources": torch.tensor([SOURCES.index(s.source) for s in sequences]),
        "rows": torch.tensor([s.row for s in sequences]),
        "teachers": torch.tensor([s.teacher for s in sequences]),
        **{f"target_{name}": value for name, value in vars(targets).items()},
    }
    if any(s.log_probs for s in sequences):
        batch["server_log_probs"] = torch.full(shape, torch.nan)
        for i, sequence in enumerate(sequences):
            start, end = sequence.prompt_length, sequence.prompt_length + len(sequence.log_probs)
            batch["server_log_probs"][i, start:end] = torch.tensor(sequence.log_probs)
    return batch
