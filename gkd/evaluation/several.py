"""Several teachers under measurement as one: each prompt is answered, and each answer judged, by its row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import Tensor

from gkd.evaluation.subject import Ask, Compare, Conditions, Rows, Share, Subject
from gkd.loss.settings import LossSettings
from gkd.rollouts.base import Rollout, SamplingSettings


@dataclass(frozen=True)
class Member:
    """One of several teachers.

    Attributes:
        name: the user's.
        subject: the teacher itself.
        sampling: how it writes in the training; its stop ids and what it may not write count here.
        loss: the loss's settings for it; None is as for all.
    """

    name: str
    subject: Subject
    sampling: SamplingSettings
    loss: LossSettings | None = None


@dataclass(frozen=True)
class SeveralSubject(Subject):
    """Teachers in the order of their numbers.

    Args:
        members: the teachers.
        numbers: whose each prompt of the evaluation is.
    """

    members: tuple[Member, ...]
    numbers: tuple[int, ...]

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingSettings,
        how: Conditions,
        rows: Sequence[int] | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        assert rows is None, "one of several teachers is several"
        assert len(prompts) == len(self.numbers), "prompts that are not the evaluation's"
        completions: list[list[int]] = [[] for _ in prompts]
        for share in self.shares(self.numbers):
            own = self.members[share.number].sampling
            as_it_stops = replace(sampling, stop_ids=own.stop_ids, extra=own.extra)
            mine = [prompts[row] for row in share.rows]
            written = share.subject.generate(mine, as_it_stops, how, share.rows, tick)
            for row, completion in zip(share.rows, written, strict=True):
                completions[row] = completion
        return completions

    def shares(self, numbers: Sequence[int]) -> list[Share]:
        found = []
        for number, member in enumerate(self.members):
            rows = [row for row, own in enumerate(numbers) if own == number]
            if rows:
                found.append(Share(member.subject, rows, member.name, number, member.loss))
        return found

    def nll(self, sequences: Rows, how: Conditions, tick: Callable[[int], None]) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in sequences]
        for share in self.shares([sequence.teacher for sequence in sequences]):
            values = share.subject.nll([sequences[row] for row in share.rows], how, tick)
            for row, own in zip(share.rows, values, strict=True):
                found[row] = own
        return found

    def _rollout(self, sampling: SamplingSettings, how: Conditions, source: str) -> Rollout:
        raise NotImplementedError("each of several teachers has a rollout of its own")

    def asked(self, how: Conditions) -> AbstractContextManager[Ask]:
        raise NotImplementedError("each of several teachers is asked by itself")

    def compared(
        self, teacher: Subject, sequences: Rows, compare: Compare, how: Conditions, tick: Callable[[int], None]
    ) -> list[Tensor] | None:
        raise NotImplementedError("each of several teachers is compared by itself")
