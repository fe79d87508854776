"""Token sequences: what a row has become, joined with a completion, cut, and padded to a batch.

Masks come from lengths, never from ids, so pad == eos changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gkd.data.sources import SOURCES
from gkd.data.targets import IGNORE, find_targets
from gkd.data.teacher_view import TEACHER

EndMap = tuple[int, int]  # the id that ends a turn for the student, and the one that ends it for the teacher


@dataclass(frozen=True)
class PaddingCollator:
    """Prepared rows as token sequences, for a training, whose rollout comes before any tensor; or padded on the right
    to the longest, whatever side the tokenizer pads on, for an evaluation, which writes nothing.

    Called, it returns int64 tensors: `input_ids`, `attention_mask`, `labels` [B, T]; `prompt_lengths`, `rows`,
    `teachers` [B]; `prompt_ids` [B, P], -100 where there are none: the prompts that are no beginnings of their rows.
    Where the teacher reads a row otherwise, `teacher_input_ids`, `teacher_attention_mask`, `teacher_labels` [B, T']
    and `teacher_prompt_ids` [B, P'], too.
    """

    pad_id: int
    pad_to_multiple_of: int | None = None
    end_map: EndMap | None = None

    def sequences(self, features: list[Mapping[str, Any]]) -> list[TokenSequence]:
        """The rows as they are; `collate` makes tensors of what becomes of them."""
        return [sequence_of(row, self.end_map) for row in features]

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = self.sequences(features)
        padded = collate(sequences, self.pad_id, self.pad_to_multiple_of)
        prompt_lengths = torch.tensor([sequence.prompt_length for sequence in sequences])
        batch = {key: padded[key] for key in (*_PADDED, "rows", "teachers")}
        batch["prompt_lengths"] = prompt_lengths
        batch["prompt_ids"] = _as_columns([sequence.prompt_ids for sequence in sequences])
        if TEACHER + "input_ids" in padded:
            batch |= {TEACHER + name: padded[TEACHER + name] for name in _PADDED}
            batch[TEACHER + "prompt_ids"] = _as_columns([sequence.teacher_prompt_ids for sequence in sequences])
        return batch


_PADDED = ("input_ids", "attention_mask", "labels")  # [B, T]
_OF_ROWS = {*_PADDED, "prompt_lengths", "prompt_ids", "rows", "teachers", "teacher_prompt_ids"}
_OF_ROWS |= {TEACHER + name for name in _PADDED}
_READ = {"input_ids", "labels", "prompt_length", "prompt_ids", "row", "teacher"}  # columns of prepared rows
_READ |= {"teacher_context", "teacher_prompt_ids"}


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
        teacher_context: what the teacher reads in front of the completion where that is not
            `input_ids[:prompt_length]`, else empty.
        teacher_prompt_ids: what the teacher writes from, and reads in front of a rollout, where that is not
            `teacher_context` (or, without one, `prompt`); else empty.
        teacher_last: what the teacher reads in the place of the last id, where its turns end with another token.
        log_prob_weight: what its tokens' negative log-likelihood is multiplied by in the loss, of a reward; signed.
        teacher_ids: the completion in the ids of a teacher with other tokens (`gkd.data.aligned_view`), else empty.
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
    teacher_context: list[int] = field(default_factory=list)
    teacher_prompt_ids: list[int] = field(default_factory=list)
    teacher_last: int | None = None
    log_prob_weight: float = 0.0
    teacher_ids: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        """What a rollout starts from."""
        return self.prompt_ids or self.input_ids[: self.prompt_length]

    @property
    def teacher_prompt(self) -> list[int]:
        """What the teacher writes from, and reads in front of a rollout."""
        return self.teacher_prompt_ids or self.teacher_context or self.prompt

    @property
    def has_view(self) -> bool:
        """Whether the teacher reads other ids than the student."""
        return bool(self.teacher_context) or self.teacher_last is not None

    @property
    def length(self) -> int:
        """Tokens that a model reads of it, the student or the teacher: the larger number."""
        own, context = len(self.input_ids), len(self.teacher_context) or self.prompt_length
        return max(own, context + (len(self.teacher_ids) or self.completion_length))

    def teacher_row(self) -> tuple[list[int], list[int]]:
        """Token ids and labels as the teacher reads them: its context and the completion, with the same targets."""
        if not self.has_view:
            return self.input_ids, self.labels
        start = self.prompt_length
        context = self.teacher_context or self.input_ids[:start]
        ids, labels = [*context, *self.input_ids[start:]], [IGNORE] * len(context) + self.labels[start:]
        if start == 0 and len(ids) > len(context):
            labels[len(context)] = IGNORE  # nothing predicts the first token of a text, so neither does the teacher
        if self.teacher_last is not None:
            ids[-1] = self.teacher_last
            labels[-1] = labels[-1] if labels[-1] == IGNORE else self.teacher_last
        return ids, labels

    def as_the_teacher_reads_it(self) -> TokenSequence:
        """`teacher_row` as a sequence of its own."""
        ids, labels = self.teacher_row()
        start = len(ids) - self.completion_length
        return replace(self, input_ids=ids, labels=labels, prompt_length=start, teacher_context=[], teacher_last=None)

    @property
    def num_targets(self) -> int:
        return sum(label != IGNORE for label in self.labels[1:])

    @property
    def completion_length(self) -> int:
        return len(self.input_ids) - self.prompt_length


def prompt_of(row: Mapping[str, Any]) -> list[int]:
    """What a rollout starts from, of a prepared row (`gkd.data.prepare.prepare_dataset`)."""
    return list(row.get("prompt_ids") or row["input_ids"][: row["prompt_length"]])


def columns_read(rows: Any) -> Any:
    """A prepared data set with the columns alone that sequences are made of."""
    return rows.select_columns([name for name in rows.column_names if name in _READ])


def sequence_of(row: Mapping[str, Any], end_map: EndMap | None = None) -> TokenSequence:
    """A prepared row as a sequence.

    Raises:
        ValueError: the teacher reads another prompt, and the row has targets in it (`assistant_turns="all"`).
    """
    ids, labels, start = list(row["input_ids"]), list(row["labels"]), int(row["prompt_length"])
    context, prompt_ids = list(row.get("teacher_context") or ()), list(row.get("prompt_ids") or ())
    writes_from = list(row.get("teacher_prompt_ids") or context)
    context = [] if context == ids[:start] else context
    sequence = TokenSequence(
        ids,
        labels,
        start,
        row=int(row.get("row", -1)),
        teacher=int(row.get("teacher", 0)),
        prompt_ids=prompt_ids,
        teacher_context=context,
        teacher_prompt_ids=[] if writes_from == (context or prompt_ids or ids[:start]) else writes_from,
        teacher_last=_last_for_the_teacher(ids[start:], end_map),
    )
    if sequence.teacher_context and any(label != IGNORE for label in labels[:start]):
        raise ValueError(
            f"row {sequence.row} has targets before its last answer (assistant_turns='all'), and the teacher reads "
            "another prompt, where they have no place: set assistant_turns='last', or leave the teacher's prompt out"
        )
    return sequence


def join(
    prompt: list[int],
    completion: list[int],
    source: str,
    row: int,
    *,
    truncated: bool = False,
    train: bool = True,
    teacher: int = 0,
    teacher_prompt: Seq[int] = (),
    end_map: EndMap | None = None,
) -> TokenSequence:
    """A sequence from a rollout: every token of the completion is trained on, or none when `train` is false.

    Args:
        teacher_prompt: what the teacher reads in front of it; () is the same prompt.
        end_map: which token ends a turn for the student, and which for the teacher; what the teacher has written ends
            with its own, and is trained on with the student's.
    """
    if source == "teacher" and end_map is not None and completion and completion[-1] == end_map[1]:
        completion = [*completion[:-1], end_map[0]]
    labels = [IGNORE] * len(prompt) + (list(completion) if train else [IGNORE] * len(completion))
    return TokenSequence(
        [*prompt, *completion],
        labels,
        len(prompt),
        source,
        row,
        truncated,
        teacher,
        teacher_context=[] if list(teacher_prompt) == prompt else list(teacher_prompt),
        teacher_last=_last_for_the_teacher(completion, end_map),
    )


def without_first(sequence: TokenSequence, number: int) -> TokenSequence:
    """The same, whose answers are trained on from behind their first `number` tokens on."""
    labels, place = list(sequence.labels), 0
    for i, label in enumerate(sequence.labels):
        place = 0 if label == IGNORE else place + 1
        if 0 < place <= number:
            labels[i] = IGNORE
    return replace(sequence, labels=labels)


def _last_for_the_teacher(completion: list[int], end_map: EndMap | None) -> int | None:
    if end_map is None or not completion or completion[-1] != end_map[0]:
        return None
    return end_map[1]


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
    prompts = _columns(batch, "prompt_ids", mask.shape[0])
    teacher_prompts = _columns(batch, TEACHER + "prompt_ids", mask.shape[0])
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
        sequence = TokenSequence(
            input_ids,
            labels,
            prompt_length,
            "data",
            row,
            teacher=teacher,
            prompt_ids=prompts[index],
            teacher_prompt_ids=teacher_prompts[index],
        )
        if TEACHER + "input_ids" in batch:
            kept = batch[TEACHER + "attention_mask"][index].bool()
            _take_view(sequence, batch[TEACHER + "input_ids"][index][kept].tolist())
        sequences.append(sequence)
    return sequences


def _take_view(sequence: TokenSequence, read: list[int]) -> None:
    """What the teacher reads of a sequence, found in the ids that it reads."""
    answer = sequence.completion_length
    context = read[: len(read) - answer]
    sequence.teacher_context = [] if context == sequence.input_ids[: sequence.prompt_length] else context
    if answer and read[-1] != sequence.input_ids[-1]:
        sequence.teacher_last = read[-1]


def _as_columns(rows: list[list[int]]) -> Tensor:
    """Lists of ids [B, P], -100 behind them."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=IGNORE)


def _columns(batch: Mapping[str, Tensor], name: str, rows: int) -> list[list[int]]:
    """What `_as_columns` was given; empty lists where the batch does not have it."""
    if name not in batch:
        return [[] for _ in range(rows)]
    return [[i for i in row if i != IGNORE] for row in batch[name].tolist()]


def cut(sequences: list[TokenSequence], sizes: Seq[int]) -> list[list[TokenSequence]]:
    """Sort by length, then cut into micro-batches of the given sizes, so that each pads to its own longest row only.
    A length is the larger of the student's and the teacher's.

    Longest first: what does not fit into memory fails at once, and later micro-batches reuse the first one's blocks.

    Raises:
        AssertionError: the sizes do not add up to the number of sequences.
    """
    assert sum(sizes) == len(sequences), (sizes, len(sequences))
    ordered = sorted(sequences, key=lambda s: -s.length)
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
        `server_log_probs` [B, T] fp32, NaN where there are none, when any row has some; so are `log_prob_weights` [B]
        where any is not 0. When the teacher reads any
        row otherwise, the same tensors and targets as it reads them, as `teacher_input_ids` and so on
        (`gkd.data.teacher_view`); target n is the same token of the same completion in both.
    """
    batch: dict[str, Tensor] = {
        **_padded([(s.input_ids, s.labels) for s in sequences], pad_id, multiple),
        "sources": torch.tensor([SOURCES.index(s.source) for s in sequences]),
        "rows": torch.tensor([s.row for s in sequences]),
        "teachers": torch.tensor([s.teacher for s in sequences]),
    }
    if any(s.has_view for s in sequences):
        view = _padded([s.teacher_row() for s in sequences], pad_id, multiple)
        assert torch.equal(view["target_rows"], batch["target_rows"]), "the teacher has other targets"
        batch |= {TEACHER + name: value for name, value in view.items()}
    if any(s.log_prob_weight for s in sequences):
        batch["log_prob_weights"] = torch.tensor([s.log_prob_weight for s in sequences])
    if any(s.log_probs for s in sequences):
        batch["server_log_probs"] = torch.full(batch["input_ids"].shape, torch.nan)
        for i, sequence in enumerate(sequences):
            start, end = sequence.prompt_length, sequence.prompt_length + len(sequence.log_probs)
            batch["server_log_probs"][i, start:end] = torch.tensor(sequence.log_probs)
    return batch


def _padded(rows: list[tuple[list[int], list[int]]], pad_id: int, multiple: int | None) -> dict[str, Tensor]:
    """Ids and labels of each row as `input_ids`, `attention_mask`, `labels` [B, T] and the targets [N]."""
    longest = max(len(ids) for ids, _ in rows)
    if multiple:
        longest = -(-longest // multiple) * multiple
    shape = (len(rows), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    for i, (ids, own_labels) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        labels[i, : len(ids)] = torch.tensor(own_labels, dtype=torch.long)
        attention_mask[i, : len(ids)] = 1
    targets = {f"target_{name}": value for name, value in vars(find_targets(labels)).items()}
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **targets}
