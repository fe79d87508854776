"""Several teachers write: each prompt is answered by the teacher of its row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.kept import SampledRollout


class RoutedRollout:
    """The rollouts of several teachers.

    Args:
        of: one for each teacher, in the order of their numbers; they sample alike.
    """

    def __init__(self, of: Sequence[SampledRollout]) -> None:
        self.of = tuple(of)

    @property
    def settings(self) -> SamplingSettings:
        return self.of[0].settings

    def generate_by(
        self, teachers: list[int], prompts: list[list[int]], step: int, rows: list[int]
    ) -> list[list[int]]:
        """One completion for each prompt, by the teacher of that number; see `Rollout.generate`.

        Every teacher is called, also without a prompt: another rank may have one for it.
        """
        assert len(teachers) == len(prompts) == len(rows)
        completions: list[list[int]] = [[] for _ in prompts]
        for number, rollout in enumerate(self.of):
            mine = [i for i, teacher in enumerate(teachers) if teacher == number]
            written = rollout.generate([prompts[i] for i in mine], step, [rows[i] for i in mine])
            for i, completion in zip(mine, written, strict=True):
                completions[i] = completion
        return completions


def routed(rollouts: Iterable[SampledRollout]) -> SampledRollout | RoutedRollout:
    """The one rollout, or several as one that routes."""
    of = list(rollouts)
    return of[0] if len(of) == 1 else RoutedRollout(of)
