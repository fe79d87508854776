"""Pure token functions: join prompt and completion, mark targets, sort by length, cut into micro-batches, pad.

B rows, T tokens, N targets, D hidden size. A target is a position whose next token is trained on:
`labels[:, 1:] != IGNORE`. Masks come from lengths, never from ids, so pad == eos changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gkd.source import SOURCES

IGNORE = -100
_OF_ROWS = ("input_ids", "attention_mask", "labels", "prompt_lengths", "prompt_ids", "rows", "teachers")


@dataclass
class Sequence:
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
    """What a rollout starts from, of a prepared row (`gkd.data.prepare_dataset`)."""
    return list(row.get("prompt_ids") or row["input_ids"][: row["prompt_length"]])


def join(
    prompt: list[int], completion: list[int], source: str, row: int, truncated: bool, train: bool, teacher: int = 0
) -> Sequence:
    """A sequence from a rollout: every token of the completion is trained on, or none when `train` is false."""
    labels = [IGNORE] * len(prompt) + (list(completion) if train else [IGNORE] * len(completion))
    return Sequence([*prompt, *completion], labels, len(prompt), source, row, truncated, teacher)


def unpad(batch: dict[str, Tensor]) -> list[Sequence]:
    """Take a collated batch apart again, row by row (any padding side).

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
            Sequence(input_ids, labels, prompt_length, "data", row, teacher=teacher, prompt_ids=prompt_ids)
        )
    return sequences


def cut(sequences: list[Sequence], sizes: Seq[int]) -> list[list[Sequence]]:
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


def collate(sequences: list[Sequence], pad_id: int, multiple: int | None = None) -> dict[str, Tensor]:
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


def target_mask(labels: Tensor) -> Tensor:
    """[B, T] labels -> [B, T - 1] bool: position t is a target when token t + 1 is trained on."""
    return labels[:, 1:] != IGNORE


@dataclass(frozen=True)
class Targets:
    """Where the N targets of a padded batch are; int64, in row-major order.

    `collate` knows them on the CPU and sends them along. Looking for them on an accelerator (a boolean mask) would
    make the CPU wait for it, each time.

    Attributes:
        at: [N] position in the flattened [B * T] batch, whose hidden state predicts the target.
        ids: [N] the token to predict.
        rows: [N] row of the batch.
        places: [N] which target of its row it is, counted from 1.
    """

    at: Tensor
    ids: Tensor
    rows: Tensor
    places: Tensor


def find_targets(labels: Tensor) -> Targets:
    """The targets of [B, T] labels. Waits for the device that they are on."""
    mask = target_mask(labels)
    rows, positions = mask.nonzero(as_tuple=True)
    return Targets(rows * labels.shape[1] + positions, labels[:, 1:][mask], rows, mask.cumsum(dim=1)[mask])


def targets_of(batch: Mapping[str, Tensor]) -> Targets:
    """The targets that `collate` has put into a batch, or those of the labels where it has not made the batch."""
    if "target_at" not in batch:
        return find_targets(batch["labels"])
    return Targets(*(batch[f"target_{name}"] for name in ("at", "ids", "rows", "places")))


def select_targets(hidden: Tensor, targets: Targets) -> Tensor:
    """[B, T, D] hidden states -> [N, D]: those that predict a target."""
    return hidden.flatten(0, 1).index_select(0, targets.at.to(hidden.device))


def sequence_weights(labels: Tensor, targets: Targets) -> Tensor:
    """[B, T] labels -> [N]: 1 / (targets of the row), so that a row's targets sum to one (GKD paper, Eq. 2)."""
    return per_target(1.0 / target_mask(labels).sum(dim=1).clamp(min=1), targets)


def per_target(values: Tensor, targets: Targets) -> Tensor:
    """[B] per-row values -> [N] per-target values."""
    return values.index_select(0, targets.rows)


def target_weights(
    labels: Tensor,
    targets: Targets,
    sources: Tensor,
    num_items: Tensor | int | None,
    reduction: str = "token",
    ce_weight: float = 0.0,
    ce_on_student_tokens: bool = False,
    nll_on_teacher_tokens: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What each target counts in loss = sum_n weights[n] D_n + ce_weights[n] CE_n.

    Args:
        labels: [B, T]. targets: of these labels.
        sources: [B], indices into SOURCES.
        num_items: targets (or sequences, reduction="sequence") of the whole step; None = of these labels.
        reduction: "token" (every target counts alike) or "sequence" (every sequence counts alike; GKD Eq. 2).
        ce_weight: w of (1 - w) D + w CE; the cross-entropy is left out on tokens that the student wrote, unless
            `ce_on_student_tokens`.
        nll_on_teacher_tokens: w = 1 on tokens that the teacher wrote: their negative log-likelihood alone (Kim &
            Rush, arXiv 1606.07947, section 3.2).

    Returns:
        weights [N] of the divergence and of the cross-entropy (None when no token has any), fp32.
    """
    mask = target_mask(labels)
    if reduction == "sequence":
        weights, own = sequence_weights(labels, targets), mask.any(dim=1).sum()
    else:
        weights, own = torch.ones(targets.at.shape[0], device=labels.device), mask.sum()
    weights = weights / (own.clamp(min=1) if num_items is None else num_items)
    if ce_weight == 0 and not nll_on_teacher_tokens:
        return weights, None
    written_by = per_target(sources, targets)
    shares = torch.full_like(weights, ce_weight)
    if nll_on_teacher_tokens:
        shares = torch.where(written_by == SOURCES.index("teacher"), 1.0, shares)
    given = torch.ones_like(weights, dtype=torch.bool)
    if not ce_on_student_tokens:
        given = written_by != SOURCES.index("student")
    return weights * (1 - shares), weights * shares * given
