"""A teacher with another tokenizer under measurement: asked about text, in its own tokens.

It answers prompts in its own ids, and what it writes is put into the student's, as in the training: so a completion's
length, repetitions and end mean the same for both. A model is compared with it by the training's own groups and
definition (`gkd.loss.aligned`).

N targets of the student, M of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gkd.data.aligned_view import BORDER, GROUP, TEACHER_GROUP, Alignment, collate_aligned
from gkd.data.rewritten import Rewriting
from gkd.data.sequences import TokenSequence
from gkd.data.targets import IGNORE
from gkd.evaluation.measures import Estimate, Metric
from gkd.evaluation.public_tasks import PublicTasks
from gkd.evaluation.subject import Ask, Compare, Conditions, Rows, Subject
from gkd.loss.signals import AlignedSignal, DenseSignal, TopKSignal
from gkd.rollouts.base import Rollout, SamplingSettings


@dataclass(frozen=True, eq=False)
class AlignedSubject(Subject):
    """A teacher with tokens of its own.

    Attributes:
        model: the teacher.
        alignment: how it is compared.
        rewriting: what puts its completions into the student's tokens.
        sampling: how it writes in the training; its stop ids and what it may not write count here.
    """

    model: Subject
    alignment: Alignment
    rewriting: Rewriting
    sampling: SamplingSettings

    @property
    def top_k(self) -> int | None:  # type: ignore[override]
        return self.model.top_k

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # type: ignore[override]
        return self.alignment.respelling.teacher.tokenizer

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingSettings,
        how: Conditions,
        rows: Sequence[int] | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        as_it_stops = replace(sampling, stop_ids=self.sampling.stop_ids, extra=self.sampling.extra)
        return [self.rewriting(ids)[0] for ids in self.model.generate(prompts, as_it_stops, how, rows, tick)]

    def shared_batch(self, sequences: list[TokenSequence], device: torch.device) -> dict[str, Tensor]:
        batch = collate_aligned(sequences, self.alignment, pad_id=0)
        of_groups = (BORDER, GROUP, TEACHER_GROUP)  # stay on the CPU
        return {name: value if name in of_groups else value.to(device) for name, value in batch.items()}

    def in_own_tokens(self, sequences: Rows) -> list[TokenSequence]:
        return [self._own(sequence) for sequence in sequences]

    def _own(self, sequence: TokenSequence) -> TokenSequence:
        """With all of the completion as targets, but the beginning of a text, which nothing predicts."""
        context, ids = self.alignment.as_read(sequence)
        labels = [IGNORE] * len(context) + ids
        if sequence.prompt_length == 0:
            first = next((place for place, i in enumerate(ids) if i != self.tokenizer.bos_token_id), 0)
            labels[: len(context) + first + 1] = [IGNORE] * (len(context) + first + 1)
        return TokenSequence([*context, *ids], labels[: len(context) + len(ids)], len(context), sequence.source)

    def _rollout(self, sampling: SamplingSettings, how: Conditions, source: str) -> Rollout:
        raise NotImplementedError("what it writes is rewritten")

    @contextmanager
    def asked(self, how: Conditions) -> Iterator[Ask]:
        with self.model.asked(how) as ask:

            def signal(batch: dict[str, Tensor]) -> AlignedSignal:
                said = ask(batch)
                assert isinstance(said, DenseSignal | TopKSignal)
                return AlignedSignal(
                    teacher=said,
                    targets=batch["teacher_target_ids"],
                    border=batch[BORDER],
                    group=batch[GROUP],
                    teacher_group=batch[TEACHER_GROUP],
                    **self.alignment.vocabularies(said.device),
                )

            yield signal

    def compared(
        self, teacher: Subject, sequences: Rows, compare: Compare, how: Conditions, tick: Callable[[int], None]
    ) -> None:
        assert teacher == self

    def nll(self, sequences: Rows, how: Conditions, tick: Callable[[int], None]) -> list[list[float]]:
        return self.model.nll(sequences, how, tick)

    def public_tasks(
        self, tasks: PublicTasks, tokenizer: PreTrainedTokenizerBase, how: Conditions
    ) -> tuple[dict[str, Estimate], dict[str, Metric]]:
        return self.model.public_tasks(tasks, self.tokenizer, how)
