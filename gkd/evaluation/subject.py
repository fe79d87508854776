"""A model under measurement, in this process or on a server: it writes, it is compared with the teacher at the targets
of sequences, which each reads behind its own prompt, and it says -log p of their tokens.

What a server gives exactly: its completions, the log-probability of a given token (so its perplexity), and its K most
likely tokens with the mass of the rest. So a divergence is that of K + 1 outcomes, a lower bound of the one over the
whole vocabulary (`gkd.teachers.server`), and the table's footnote says so.

B rows, T tokens, N targets, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd.data.sequences import TokenSequence, collate
from gkd.data.targets import IGNORE, select_targets, target_mask, targets_of
from gkd.data.teacher_view import teacher_view
from gkd.evaluation.measures import Estimate, Metric
from gkd.evaluation.public_tasks import PublicTasks
from gkd.evaluation.timing import Step, step_of
from gkd.loss.parts import SplitSignal
from gkd.loss.settings import LossSettings
from gkd.loss.signals import AlignedSignal, DenseSignal, Head, TeacherSignal
from gkd.models.generation_mode import generation_mode
from gkd.models.head import head_of, output_layer
from gkd.models.hidden import last_hidden
from gkd.rollouts.base import Rollout, SamplingSettings
from gkd.rollouts.folding import foldable, folded
from gkd.rollouts.hf import HFRollout
from gkd.teachers.base import Teacher

Signal = TeacherSignal | AlignedSignal
Ask = Callable[[dict[str, Tensor]], Signal]  # a batch of `Subject.shared_batch` -> what is said about its targets
Compare = Callable[[DenseSignal, Signal, Tensor], Tensor]  # student, teacher, targets [N] -> [N, values]
_Read = Callable[[DenseSignal, dict[str, Tensor], Tensor], Tensor]  # what the model says, batch, targets -> [N, ...]
Collate = Callable[[list[TokenSequence], torch.device], dict[str, Tensor]]
Rows = Sequence[TokenSequence]
CHUNK_LOGITS = 2**25  # numbers in one chunk of logits for the perplexity: 128 MiB in fp32


def token_nll(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """-log p(target) [N] in nats, fp32, of hidden states [N, D]; only one chunk of logits exists at a time."""
    rows = max(1, CHUNK_LOGITS // head.weight.shape[0])
    chunks = zip(hidden.to(head.weight.dtype).split(rows), targets.split(rows), strict=True)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [nn.functional.cross_entropy(head.logits(h).float(), t, reduction="none") for h, t in chunks]
    return torch.cat(parts)


def hidden_of_targets(model: PreTrainedModel, batch: dict[str, Tensor], device: torch.device | None = None) -> Tensor:
    """Hidden states [N, D] that predict the batch's targets, on `device`."""
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    hidden, _ = last_hidden(model, output_layer(model), inputs)
    return select_targets(hidden, targets_of(batch)).to(device or hidden.device)


def collated(sequences: list[TokenSequence], device: torch.device) -> dict[str, Tensor]:
    """One right-padded batch; the id of the padding does not matter."""
    return {key: value.to(device) for key, value in collate(sequences, pad_id=0).items()}


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in batches of `size`, longest first, so that rows of like length share their padding."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    yield from (order[start : start + size] for start in range(0, len(order), size))


@dataclass(frozen=True)
class Conditions:
    """Under which all models are measured alike.

    Attributes:
        seed: of the sampling.
        batch_size: sequences per forward pass.
        accelerator: for its autocast; None runs in the models' own dtype.
        fold_adapter: as in the training: whether an adapter is folded into a copy of the weights to generate.
    """

    seed: int = 0
    batch_size: int = 8
    accelerator: Accelerator | None = None
    fold_adapter: bool = True


@dataclass(frozen=True)
class Share:
    """What one teacher is asked about.

    Attributes:
        subject: the teacher. rows: which of the sequences are its own.
        name: its name, of several. number: its place among them.
        loss: the loss's settings for it; None is as for all.
    """

    subject: Subject
    rows: Sequence[int]
    name: str | None = None
    number: int = 0
    loss: LossSettings | None = None


class Subject(ABC):
    """A model under measurement. Two subjects of the same model are equal.

    Attributes:
        top_k: how many tokens it scores at a position; None is all of them.
        tokenizer: its own, where its tokens are not the student's (`gkd.evaluation.aligned`).
    """

    top_k: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingSettings,
        how: Conditions,
        rows: Sequence[int] | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """One completion of each prompt; `rows` are their numbers in the evaluation, without them they are all. The
        source of the random numbers is no training source, so none is used twice, and they belong to no training
        step. `tick` gets how many have been written."""
        rollout = self._rollout(sampling, how, source="evaluation")
        rollout.tick = tick
        return rollout.generate(prompts, step=0) if rows is None else rollout.generate(prompts, 0, list(rows))

    def shares(self, numbers: Sequence[int]) -> list[Share]:
        """Who stands for the teacher, of sequences whose teachers have these numbers: itself, or several."""
        return [Share(self, list(range(len(numbers))))]

    def shared_batch(self, sequences: list[TokenSequence], device: torch.device) -> dict[str, Tensor]:
        """A batch on which a model is compared with it, as the teacher."""
        return collated(sequences, device)

    def in_own_tokens(self, sequences: Rows) -> list[TokenSequence]:
        """The sequences, of the student's tokens behind prompts of its own, as it reads them."""
        return list(sequences)

    @abstractmethod
    def _rollout(self, sampling: SamplingSettings, how: Conditions, source: str) -> Rollout:
        """What samples from it."""

    @abstractmethod
    def asked(self, how: Conditions) -> AbstractContextManager[Ask]:
        """Inside, what it says about a batch's targets as the teacher, on the batch's device."""

    @abstractmethod
    def compared(
        self,
        teacher: Subject,
        sequences: Rows,
        compare: Compare,
        how: Conditions,
        tick: Callable[[int], None],
    ) -> list[Tensor] | None:
        """`compare` of the targets of each sequence, in float64 on the CPU; None for one that can only be the teacher
        itself. `tick` gets how many sequences have been read."""

    @abstractmethod
    def nll(self, sequences: Rows, how: Conditions, tick: Callable[[int], None]) -> list[list[float]]:
        """-log p in nats of the targets of each sequence, which is in its own tokens, over the whole vocabulary."""

    def stepping(self, prompt: Sequence[int], how: Conditions) -> AbstractContextManager[Step | None]:
        """Inside, passes over tokens behind a prompt in the cache; None where that cannot be measured here."""
        return nullcontext()

    def public_tasks(
        self, tasks: PublicTasks, tokenizer: PreTrainedTokenizerBase, how: Conditions
    ) -> tuple[dict[str, Estimate], dict[str, Metric]]:
        """As `PublicTasks.measure`; nothing of a model that cannot run them."""
        return {}, {}


@dataclass(frozen=True)
class LocalSubject(Subject):
    """A causal language model in this process, bare or prepared by accelerate, with or without a LoRA adapter."""

    model: nn.Module

    def _rollout(self, sampling: SamplingSettings, how: Conditions, source: str) -> Rollout:
        return HFRollout(
            lambda: self.model,
            how.accelerator,
            sampling,
            seed=how.seed,
            source=source,
            batch_size=how.batch_size,
            merge_adapter=how.fold_adapter,
        )

    @contextmanager
    def asked(self, how: Conditions) -> Iterator[Ask]:
        with generation_mode(self.model, how.accelerator) as bare:
            head = head_of(bare)
            yield lambda batch: DenseSignal(hidden_of_targets(bare, teacher_view(batch), batch["labels"].device), head)

    def compared(
        self,
        teacher: Subject,
        sequences: Rows,
        compare: Compare,
        how: Conditions,
        tick: Callable[[int], None],
    ) -> list[Tensor] | None:
        @contextmanager
        def comparing() -> Iterator[_Read]:
            with teacher.asked(how) as ask:
                yield lambda own, batch, targets: compare(own, ask(batch), targets)

        return self._of_targets(sequences, comparing(), how, tick, teacher.shared_batch)

    def nll(self, sequences: Rows, how: Conditions, tick: Callable[[int], None]) -> list[list[float]]:
        def read(own: DenseSignal, batch: dict[str, Tensor], targets: Tensor) -> Tensor:
            return token_nll(own.hidden, own.head, targets)

        return [values.tolist() for values in self._of_targets(sequences, nullcontext(read), how, tick)]

    @contextmanager
    def stepping(self, prompt: Sequence[int], how: Conditions) -> Iterator[Step | None]:
        with generation_mode(self.model, how.accelerator) as bare:
            layers = foldable(bare) if how.fold_adapter else []  # as it is served
            with folded(layers, how.seed):
                yield step_of(bare, prompt)

    def public_tasks(
        self, tasks: PublicTasks, tokenizer: PreTrainedTokenizerBase, how: Conditions
    ) -> tuple[dict[str, Estimate], dict[str, Metric]]:
        with generation_mode(self.model, how.accelerator) as bare:
            return tasks.measure(bare, tokenizer)

    def _of_targets(
        self,
        sequences: Rows,
        reading: AbstractContextManager[_Read],
        how: Conditions,
        tick: Callable[[int], None],
        collate: Collate = collated,
    ) -> list[Tensor]:
        """What `reading` makes of the targets of each sequence, batch by batch."""
        found = [torch.empty(0)] * len(sequences)
        with generation_mode(self.model, how.accelerator) as bare, reading as read:
            head = head_of(bare)
            for rows in batches([sequence.length for sequence in sequences], how.batch_size):
                batch = collate([sequences[row] for row in rows], bare.device)
                targets = batch["labels"][:, 1:][target_mask(batch["labels"])]
                tick(len(rows))
                values = read(DenseSignal(hidden_of_targets(bare, batch), head), batch, targets).cpu().double()
                for row, own in zip(rows, values.split([sequences[row].num_targets for row in rows]), strict=True):
                    found[row] = own
        return found


@dataclass(frozen=True)
class ServedSubject(Subject):
    """A teacher that writes and is asked without a model in this process (`Teacher.writes`)."""

    teacher: Teacher

    @property
    def top_k(self) -> int | None:  # type: ignore[override]
        return self.teacher.top_k

    def _rollout(self, sampling: SamplingSettings, how: Conditions, source: str) -> Rollout:
        return self.teacher.rollout(sampling, seed=how.seed, source=source)

    def asked(self, how: Conditions) -> AbstractContextManager[Ask]:
        return nullcontext(self._asked)

    def _asked(self, batch: dict[str, Tensor]) -> TeacherSignal:
        signal = self.teacher.score(teacher_view(batch))
        assert not isinstance(signal, SplitSignal), "several teachers are several subjects"
        return signal

    def compared(
        self,
        teacher: Subject,
        sequences: Rows,
        compare: Compare,
        how: Conditions,
        tick: Callable[[int], None],
    ) -> list[Tensor] | None:
        assert teacher == self
        return None

    def nll(self, sequences: Rows, how: Conditions, tick: Callable[[int], None]) -> list[list[float]]:
        with_targets = [sequence for sequence in sequences if sequence.num_targets]
        starts = [(sequence.input_ids, _first_target(sequence)) for sequence in with_targets]
        told = iter(self.teacher.log_probs(starts))
        return [[-value for value in next(told)] if sequence.num_targets else [] for sequence in sequences]


def _first_target(sequence: TokenSequence) -> int:
    """Where its targets begin, which go on to its end."""
    first = next(place for place, label in enumerate(sequence.labels) if place and label != IGNORE)
    assert IGNORE not in sequence.labels[first:], "a target behind which there is none"
    return first


def subject_of(teacher: Teacher) -> Subject | None:
    """What the evaluation compares with; None when there is no single teacher that could write and be measured."""
    if teacher.writes:
        return ServedSubject(teacher)
    return None if teacher.model is None or teacher.writes_only else LocalSubject(teacher.model)
