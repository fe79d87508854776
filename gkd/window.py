"""One optimizer step's rows on one rank: which source each has, and the completions that are written for it.

The rollout happens once per source and optimizer step for all micro-batches together: weights do not move inside a
window, so everything in it is on-policy, and the engine gets one large request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd.batch import Sequence, join, unpad
from gkd.rollouts.base import Rollout, is_truncated
from gkd.source import SOURCES


@dataclass
class Window:
    """The rows of one optimizer step on this rank.

    Attributes:
        sequences: rows in the order of the data stream.
        sizes: rows per micro-batch.
        indices: each row's number in the whole step, over all ranks; what sources and sampling are keyed on.
        total: rows in the whole step.
    """

    sequences: list[Sequence]
    sizes: list[int]
    indices: list[int]
    total: int


def open_window(batches: list[dict[str, Tensor]], rank: int, world_size: int) -> Window:
    """Take the collated micro-batches of a step apart and number their rows as one process would meet them.

    accelerate deals batches out in turn: micro-batch i of rank r is batch i * world_size + r of the stream, and its
    even_batches makes the ranks' batches equally large. So the numbering is the same for any number of ranks.
    """
    sequences: list[Sequence] = []
    sizes: list[int] = []
    indices: list[int] = []
    start = 0
    for batch in batches:
        rows = unpad(batch)
        sequences += rows
        sizes.append(len(rows))
        indices += range(start + rank * len(rows), start + (rank + 1) * len(rows))
        start += world_size * len(rows)
    return Window(sequences, sizes, indices, start)


def write_completions(
    window: Window,
    sources: list[str],
    rollouts: Mapping[str, Rollout],
    step: int,
    *,
    stop_ids: Mapping[str, tuple[int, ...]],
    max_new_tokens: int,
    train_truncated: bool = True,
) -> list[Sequence]:
    """Replace the completions of "student" and "teacher" rows by rollouts from their prompts.

    Every rank calls every needed rollout, also with no prompt of its own, since a sharded model needs all ranks.

    Args:
        window: this rank's rows.
        sources: source of every row of the whole step (`window.total`).
        rollouts: by source.
        step: the optimizer step.
        stop_ids: by source; a completion that reached the cap without one is truncated.
        max_new_tokens: the cap.
        train_truncated: whether truncated completions are trained on.
    """
    assert len(sources) == window.total, (len(sources), window.total)
    written = list(window.sequences)
    for source in ("student", "teacher"):
        if source not in sources:
            continue
        mine = [i for i, index in enumerate(window.indices) if sources[index] == source]
        prompts = [window.sequences[i].input_ids[: window.sequences[i].prompt_length] for i in mine]
        completions = rollouts[source].generate(prompts, step, [window.indices[i] for i in mine])
        for i, prompt, completion in zip(mine, prompts, completions, strict=True):
            truncated = is_truncated(completion, stop_ids[source], max_new_tokens)
            train = train_truncated or not truncated
            written[i] = join(prompt, completion, source, window.sequences[i].row, truncated, train)
    return written


def count(sequences: list[Sequence]) -> Tensor:
    """[2, 3] int64: sequences, and target tokens, by source (SOURCES); sequences without a target do not count."""
    counts = torch.zeros(2, len(SOURCES), dtype=torch.int64)
    for sequence in sequences:
        targets = sequence.num_targets
        counts[0, SOURCES.index(sequence.source)] += targets > 0
        counts[1, SOURCES.index(sequence.source)] += targets
    return counts
