"""Several teachers write: each prompt is answered by the teacher of its row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gkd.rollouts.base import Rollout


class RoutedRollout(Rollout):
    """The rollouts of several teachers.

    Args:
        of: one for each teacher, in the order of their numbers; they sample alike.
    """

    def __init__(self, of: Sequence[Rollout]) -> None:
        super().__init__(of[0].settings)
        self.by_teacher = tuple(of)

    def each(self) -> Sequence[Rollout]:
        return self.by_teacher

    def generate(
        self, prompts: list[list[int]], step: int, rows: list[int] | None = None, teachers: list[int] | None = None
    ) -> list[list[int]]:
        """One completion for each prompt, by the teacher of that number; see `Rollout.generate`.

        Every teacher is called, also without a prompt: another rank may have one for it.
        """
        rows = self._numbered(prompts, rows)
        assert teachers is not None, "several teachers write, and it is not said whose each row is"
        assert len(teachers) == len(prompts)
        completions: list[list[int]] = [[] for _ in prompts]
        for number, rollout in enumerate(self.by_teacher):
            mine = [i for i, teacher in enumerate(teachers) if teacher == number]
            written = rollout.generate([prompts[i] for i in mine], step, [rows[i] for i in mine])
            for i, completion in zip(mine, written, strict=True):
                completions[i] = completion
        return completions


def routed(rollouts: Iterable[Rollout]) -> Rollout:
    """The one rollout, or several as one that routes."""
    of = list(rollouts)
    return of[0] if len(of) == 1 else RoutedRollout(of)
