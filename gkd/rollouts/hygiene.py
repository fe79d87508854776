"""Which completions are sound enough to train on: cut off without a stop token, or repeating themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gkd.common.ranges import whole, within
from gkd.data.rewritten import Rewriting


def is_truncated(completion: list[int], stop_ids: tuple[int, ...], max_new_tokens: int) -> bool:
    """True when the cap, not a stop token, ended the completion."""
    return len(completion) >= max_new_tokens and completion[-1] not in stop_ids


def repeated_ngram_share(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams of `ids` that occurred before: 0 when all differ (or there is none), near 1 in a loop."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Verdict:
    """What a completion is like: `ended` with a stop token, `truncated` by the cap, `empty` (nothing but a stop
    token), `repetitive` (a loop)."""

    ended: bool
    truncated: bool
    empty: bool
    repetitive: bool


@dataclass(frozen=True)
class Hygiene:
    """What a sound completion is, and which others are trained on.

    Attributes:
        stop_ids: by source, those of the model that writes it; data rows end with the student's.
        max_new_tokens: the cap; a rollout that reached it without a stop token is truncated.
        repetition_threshold: a completion is repetitive when a larger share of its 4-grams occurred before in it.
        train_truncated: whether truncated rollouts are trained on.
        train_repetitive: whether repetitive rollouts are trained on. Data rows always are.
        end_map: the token that ends a turn for the student, and the one that does for the teacher, where they are
            not the same: what the teacher has written is trained on with the student's.
        student_tokens: the cap of the student's rollouts, where it is another (a schedule's); None is the same.
        rewriting: of a teacher with other tokens, what puts its completions into the student's.
        aligned: such a teacher is compared with, too, so that it reads what is trained on.

    Raises:
        ValueError: a value out of range.
    """

    stop_ids: Mapping[str, tuple[int, ...]]
    max_new_tokens: int
    repetition_threshold: float = 0.5
    train_truncated: bool = True
    train_repetitive: bool = True
    end_map: tuple[int, int] | None = None
    rewriting: Rewriting | None = None
    student_tokens: int | None = None
    aligned: bool = False

    def __post_init__(self) -> None:
        whole("max_new_tokens", self.max_new_tokens, 1)
        within("repetition_threshold", self.repetition_threshold, 0, 1, "1 calls nothing repetitive")

    def received(self, completion: list[int], source: str) -> tuple[list[int], Verdict]:
        """A completion as `source` has written it: in the student's tokens, and what it is like."""
        if source != "teacher" or self.rewriting is None:
            return completion, self.judge(completion, source)
        ids, ended = self.rewriting(completion)
        return ids, self._verdict(ids, ended=ended, truncated=not ended)

    def judge(self, completion: list[int], source: str) -> Verdict:
        """What this completion, written by `source`, is like, as it is trained on; where the teacher's tokens are the
        student's, as it was written, too."""
        foreign = source == "teacher" and self.rewriting is not None
        stops = self.stop_ids["teacher" if source == "teacher" and not foreign else "student"]
        if source == "teacher" and self.end_map is not None:
            stops = (*stops, self.end_map[0])
        ended = bool(completion) and completion[-1] in stops
        own = self.student_tokens if source == "student" else None
        cap = self.max_new_tokens if own is None else own
        cut = not ended if foreign else source != "data" and is_truncated(completion, stops, cap)
        return self._verdict(completion, ended=ended, truncated=cut)

    def _verdict(self, completion: list[int], *, ended: bool, truncated: bool) -> Verdict:
        return Verdict(
            ended=ended,
            truncated=truncated,
            empty=len(completion) == int(ended),
            repetitive=repeated_ngram_share(completion) > self.repetition_threshold,
        )

    def trains(self, verdict: Verdict) -> bool:
        """Whether a rollout like this is trained on."""
        return (self.train_truncated or not verdict.truncated) and (self.train_repetitive or not verdict.repetitive)
