"""Whether the student's rollouts are still sound: what they are like in a window of steps, beside what they should
be.

Counts are of all ranks, so every rank judges alike. Beside the student's stand those of the reference: the teacher's
own sequences where it writes any (`seq_kd`), else the data's answers to the prompts that the student answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gkd.data.sequences import TokenSequence
from gkd.data.targets import IGNORE
from gkd.rollouts.hygiene import Hygiene, Verdict

# Of rollouts: how many, their tokens, how many were cut off, hold nothing but a stop token, repeat themselves, are any
# of these: a student that is driven to and fro is bad in one way or another.
COUNTS = ("rows", "tokens", "truncated", "empty", "repetitive", "unsound")
SHARES = COUNTS[2:]
# In millionths of a nat: entropies of student and teacher, summed over so many of the student's tokens.
ENTROPIES = ("entropy", "teacher_entropy", "targets")
SIZE = 2 * len(COUNTS) + len(ENTROPIES)

LEAST_ROWS = 16  # below so many rollouts a window is not judged
SHORT, LONG = 0.25, 4.0  # of the reference's mean length; and of the start's twice and half of that
FLOOR = 0.1  # of the teacher's entropy on the student's own tokens, and of the student's at the start
_LONGEST = 50  # steps that a window may reach back for its rows


@dataclass(frozen=True)
class Signal:
    """One measure of a window.

    Attributes:
        name: `truncated`, `empty`, `repetitive`, `unsound` (shares of the rollouts), `short`, `long` (their mean
            length), `entropy`.
        value: of the window. limit: beyond it the student has collapsed. calm: up to here it is as it should be.
        falls: whether low values are the bad ones.
    """

    name: str
    value: float
    limit: float
    calm: float
    falls: bool = False

    @property
    def fires(self) -> bool:
        return self.value < self.limit if self.falls else self.value > self.limit

    @property
    def is_calm(self) -> bool:
        return self.value >= self.calm if self.falls else self.value <= self.calm

    def in_words(self) -> str:
        """`truncated 0.71 (limit 0.52)`."""
        return f"{self.name} {self.value:.3g} (limit {self.limit:.3g})"


@dataclass
class Health:
    """What is known of the student's rollouts so far; in a checkpoint.

    Attributes:
        steps: counts of the last steps with a rollout, [SIZE] each.
        start: the student's counts of the first rollouts.
        reference: the reference's counts so far.
        best: of each share, the lowest that a window has had.
        start_entropy: the student's at first, nats; None before the first.
    """

    steps: list[list[int]] = field(default_factory=list)
    start: list[int] = field(default_factory=lambda: [0] * len(COUNTS))
    reference: list[int] = field(default_factory=lambda: [0] * len(COUNTS))
    best: dict[str, float] = field(default_factory=dict)
    start_entropy: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "steps": [list(step) for step in self.steps],
            "start": list(self.start),
            "reference": list(self.reference),
            "best": dict(self.best),
            "start_entropy": self.start_entropy,
        }

    def add(self, counts: Sequence[int], window: int) -> None:
        """A step's rollouts, of all ranks; entropies are those of the step before. `window`: steps that are kept, more
        where they have few rollouts."""
        own, reference, entropies = split(counts)
        if self.steps and entropies[-1]:
            self.steps[-1][2 * len(COUNTS) :] = entropies
        self.reference = _sum(self.reference, reference)
        if own["rows"] == 0:
            return
        if self.start[0] < LEAST_ROWS:
            self.start = _sum(self.start, own)
        self.steps.append([*counts[: 2 * len(COUNTS)], 0, 0, 0])
        while len(self.steps) > window and (
            len(self.steps) > _LONGEST or sum(step[0] for step in self.steps[1:]) >= LEAST_ROWS
        ):
            del self.steps[0]

    def judge(self, threshold: float, cap_changes: bool) -> list[Signal]:
        """The window's signals; none while too little is known.

        Args:
            threshold: a share fires at this part of the way from where it should be to 1.
            cap_changes: `max_new_tokens` follows a schedule: what was cut off is then compared with the reference of
                the same steps alone, and lengths are not.
        """
        total = [sum(column) for column in zip(*self.steps, strict=True)] or [0] * SIZE
        own, beside, entropies = split(total)
        if own["rows"] < LEAST_ROWS:
            return []
        found = [self._share(name, own, threshold) for name in (SHARES[1:-1] if cap_changes else SHARES)]
        if not cap_changes:
            found += self._lengths(own["tokens"] / own["rows"])
        elif beside["rows"] >= LEAST_ROWS:  # at the same caps
            level = beside["truncated"] / beside["rows"]
            found.append(_share_above("truncated", own["truncated"] / own["rows"], level, threshold))
        if entropies[2]:
            found += self._entropy(entropies[0] / entropies[2] / 1e6, entropies[1] / entropies[2] / 1e6)
        return found

    def of_last_step(self, signals: Sequence[Signal]) -> list[Signal]:
        """The same of the last step alone, whose rollouts are of the present weights."""
        own = split(self.steps[-1])[0]
        values = {name: own[name] / own["rows"] for name in COUNTS}
        values |= {"short": values["tokens"], "long": values["tokens"]}
        return [replace(one, value=values[one.name]) for one in signals if one.name in values]

    def forget_window(self) -> None:
        """Begin a new window: something was changed."""
        self.steps = []

    def shares(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """Of the window and of the reference; None while one is not known."""
        total = [sum(column) for column in zip(*self.steps, strict=True)] or [0] * SIZE
        own, reference = split(total)[0], dict(zip(COUNTS, self.reference, strict=True))
        if min(own["rows"], reference["rows"]) < LEAST_ROWS:
            return None
        return tuple({name: one[name] / one["rows"] for name in SHARES} for one in (own, reference))  # type: ignore[return-value]

    def _share(self, name: str, own: dict[str, int], threshold: float) -> Signal:
        value = own[name] / own["rows"]
        self.best[name] = min(value, self.best.get(name, 1.0))
        level = max(self.best[name], self._of_reference(name) or 0.0)
        return _share_above(name, value, level, threshold)

    def _lengths(self, value: float) -> list[Signal]:
        reference = self._of_reference("tokens")
        if reference is None:
            return []
        start = self.start[1] / self.start[0]
        low, high = min(SHORT * reference, 2 * SHORT * start), max(LONG * reference, LONG / 2 * start)
        return [Signal("short", value, low, low * 2**0.5, falls=True), Signal("long", value, high, high / 2**0.5)]

    def _entropy(self, student: float, teacher: float) -> list[Signal]:
        if self.start_entropy is None:
            self.start_entropy = student
        limit = FLOOR * min(teacher, self.start_entropy)
        return [Signal("entropy", student, limit, 2 * limit, falls=True)]

    def _of_reference(self, name: str) -> float | None:
        rows = self.reference[0]
        return self.reference[COUNTS.index(name)] / rows if rows >= LEAST_ROWS else None


def _share_above(name: str, value: float, level: float, threshold: float) -> Signal:
    return Signal(name, value, level + threshold * (1 - level), level + threshold / 2 * (1 - level))


def split(counts: Sequence[int]) -> tuple[dict[str, int], dict[str, int], list[int]]:
    """[SIZE] -> the student's counts, the reference's, the entropies."""
    n = len(COUNTS)
    own, reference = (dict(zip(COUNTS, counts[i : i + n], strict=True)) for i in (0, n))
    return own, reference, list(counts[2 * n :])


def count_rollouts(
    rows: Sequence[TokenSequence],
    written: Sequence[TokenSequence],
    verdicts: Sequence[Verdict],
    hygiene: Hygiene,
    teacher_writes: bool,
) -> list[int]:
    """This rank's counts of a step, without entropies.

    Args:
        rows: of the window, as they came: with the data's answers, where they have any.
        written: the same with their completions. verdicts: of these.
        hygiene: judges the data's answers.
        teacher_writes: its sequences are the reference, not the data's answers.
    """
    own, reference = [0] * len(COUNTS), [0] * len(COUNTS)
    for row, sequence, verdict in zip(rows, written, verdicts, strict=True):
        if sequence.source == "student":
            _add(own, sequence.completion_length, verdict.truncated, verdict)
            answer = [] if teacher_writes else _answer(row)
            if answer:
                cap = hygiene.max_new_tokens if hygiene.student_tokens is None else hygiene.student_tokens
                _add(reference, min(len(answer), cap), len(answer) > cap, hygiene.judge(answer, "data"))
        elif sequence.source == "teacher":
            _add(reference, sequence.completion_length, verdict.truncated, verdict)
    return own + reference


def _add(counts: list[int], length: int, truncated: bool, verdict: Verdict) -> None:
    unsound = truncated or verdict.empty or verdict.repetitive
    for i, value in enumerate((1, length, truncated, verdict.empty, verdict.repetitive, unsound)):
        counts[i] += int(value)


def _answer(row: TokenSequence) -> list[int]:
    """The last answer of a row of the data; empty where it has none."""
    end = len(row.labels)
    while end > 0 and row.labels[end - 1] == IGNORE:
        end -= 1
    start = end
    while start > 0 and row.labels[start - 1] != IGNORE:
        start -= 1
    return row.input_ids[start:end]


def _sum(counts: Sequence[int], more: dict[str, int]) -> list[int]:
    return [count + more[name] for count, name in zip(counts, COUNTS, strict=True)]
