"""One optimizer step's rows on one rank: which source each has, and the completions that are written for it.

The rollout happens once per source and optimizer step for all micro-batches together: weights do not move inside a
window, so everything in it is on-policy, and the engine gets one large request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gkd.data.sequences import TokenSequence, join
from gkd.data.sources import SOURCES
from gkd.data.targets import IGNORE
from gkd.rollouts.base import Rollout
from gkd.rollouts.hygiene import Hygiene, Verdict
from gkd.training.metrics import Meter


@dataclass
class Window:
    """The rows of one optimizer step on this rank.

    Attributes:
        sequences: rows in the order of the data stream.
        sizes: rows per micro-batch.
        indices: each row's number in the whole step, over all ranks; what sources and sampling are keyed on.
        total: rows in the whole step.
        fillers: sequences of one token and no target, where this rank has fewer rows than its micro-batches have
            places (`sizes` counts both).
    """

    sequences: list[TokenSequence]
    sizes: list[int]
    indices: list[int]
    total: int
    fillers: list[TokenSequence] = field(default_factory=list)


def open_window(
    batches: list[list[TokenSequence]], rank: int, world_size: int, rows_of_last: int | None = None
) -> Window:
    """Number the rows of a step's micro-batches as one process would meet them.

    accelerate deals batches out in turn: micro-batch i of rank r is batch i * world_size + r of the stream, and its
    even_batches makes the ranks' batches equally large. So the numbering is the same for any number of ranks.

    Args:
        batches: of this rank.
        rank, world_size: this rank's number, and how many there are.
        rows_of_last: rows in the ranks' last batches together; what stands behind them in an epoch's last round are
            rows that even_batches repeats from its beginning. They have been trained on, so fillers take their
            places. None: there are no repeats.
    """
    window = Window([], [], [], 0)
    for rows in batches:
        window.sizes.append(len(rows))
        end = window.total + world_size * len(rows)
        if rows is batches[-1] and rows_of_last is not None:
            end = window.total + rows_of_last
        for index, row in enumerate(rows, start=window.total + rank * len(rows)):
            if index < end:
                window.sequences.append(row)
                window.indices.append(index)
            else:
                window.fillers.append(TokenSequence(row.input_ids[:1], [IGNORE], 1, row=row.row, teacher=row.teacher))
        window.total = end
    return window


def prompts_of(window: Window, sources: list[str], source: str) -> tuple[list[int], list[list[int]], list[int]]:
    """What `source` writes on this rank: places in the window, prompts as the source reads them, row numbers in the
    step."""
    mine = [i for i, index in enumerate(window.indices) if sources[index] == source]
    rows = [window.sequences[i] for i in mine]
    prompts = [row.teacher_prompt if source == "teacher" else row.prompt for row in rows]
    return mine, prompts, [window.indices[i] for i in mine]


def write_completions(
    window: Window,
    sources: list[str],
    rollouts: Mapping[str, Rollout],
    step: int,
    hygiene: Hygiene,
) -> list[TokenSequence]:
    """Replace the completions of "student" and "teacher" rows by rollouts from their prompts. Where the teacher has a
    prompt of its own it writes from that one, and what it wrote is trained on behind the student's.

    Every rank calls every needed rollout, also with no prompt of its own, since a sharded model needs all ranks.

    Args:
        window: this rank's rows.
        sources: source of every row of the whole step (`window.total`).
        rollouts: by source.
        step: the optimizer step.
        hygiene: a completion that it does not train on gives a sequence without a target.
    """
    assert len(sources) == window.total, (len(sources), window.total)
    written = list(window.sequences)
    for source in ("student", "teacher"):
        if source not in sources:
            continue
        mine, prompts, numbers = prompts_of(window, sources, source)
        rows = [window.sequences[i] for i in mine]
        rollout = rollouts[source]
        completions = rollout.generate(prompts, step, numbers, [row.teacher for row in rows])
        for i, row, completion in zip(mine, rows, completions, strict=True):
            ids, verdict = hygiene.received(completion, source)
            written[i] = join(
                row.prompt,
                ids,
                source,
                row.row,
                truncated=verdict.truncated,
                train=hygiene.trains(verdict),
                teacher=row.teacher,
                teacher_prompt=() if hygiene.rewriting and not hygiene.aligned else row.teacher_prompt,
                end_map=hygiene.end_map,
            )
            if hygiene.aligned and source == "teacher":
                written[i].teacher_ids = completion
        for i, log_probs in zip(mine, rollout.log_probs, strict=False):  # none where nobody asked for them
            written[i].log_probs = log_probs
    return written


def measure(sequences: list[TokenSequence], hygiene: Hygiene, meter: Meter) -> list[Verdict]:
    """Count lengths and unsound completions by source, whether they are trained on or not; what each is like."""
    verdicts = [hygiene.judge(one.input_ids[one.prompt_length :], one.source) for one in sequences]
    for sequence, verdict in zip(sequences, verdicts, strict=True):
        meter.add_sequence(sequence, verdict.ended, verdict.repetitive, verdict.empty)
    return verdicts


def count(sequences: list[TokenSequence]) -> Tensor:
    """[2, 3] int64: sequences, and target tokens, by source (SOURCES); sequences without a target do not count."""
    counts = torch.zeros(2, len(SOURCES), dtype=torch.int64)
    for sequence in sequences:
        targets = sequence.num_targets
        counts[0, SOURCES.index(sequence.source)] += targets > 0
        counts[1, SOURCES.index(sequence.source)] += targets
    return counts
