"""One row in ids, which of its answers are trained on, and the lengths that it is held to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from gkd.common.ranges import one_of, whole
from gkd.data.targets import IGNORE


@dataclass(frozen=True)
class Encoded:
    """One row in ids; `notes` are keys of `gkd.data.row_report.NOTES`.

    A rollout starts from `prompt`: `prompt_ids` where the row begins otherwise, else `input_ids[:prompt_length]`.

    The teacher reads `teacher_context` in front of the completion where that is not `input_ids[:prompt_length]`, and
    writes from `teacher_prompt`: `teacher_prompt_ids` where that is neither `teacher_context` nor (without) `prompt`.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    notes: tuple[str, ...] = ()
    prompt_ids: list[int] = field(default_factory=list)
    teacher_context: list[int] = field(default_factory=list)
    teacher_prompt_ids: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        return self.prompt_ids or self.input_ids[: self.prompt_length]

    @property
    def prompt_only(self) -> bool:
        return self.labels.count(IGNORE) == len(self.labels)

    def starting_from(self, prompt: list[int]) -> Encoded:
        """With this prompt for rollouts, which is kept beside the row only where the row does not begin with it."""
        same = self.input_ids[: self.prompt_length] == prompt
        if same and not self.prompt_ids:
            return self
        return replace(self, prompt_ids=[] if same else prompt)

    @property
    def teacher_prompt(self) -> list[int]:
        return self.teacher_prompt_ids or self.teacher_context or self.prompt

    @property
    def has_view(self) -> bool:
        """Whether the teacher reads or writes from something of its own."""
        return bool(self.teacher_context or self.teacher_prompt_ids)

    def read_by_teacher(self, context: list[int], prompt: list[int]) -> Encoded:
        """With what the teacher reads in front of the completion, and writes from; each is kept only where it differs
        from the student's."""
        own = [] if context == self.input_ids[: self.prompt_length] else context
        return replace(self, teacher_context=own, teacher_prompt_ids=[] if prompt == (own or self.prompt) else prompt)

    def noted(self, note: str, **changes: Any) -> Encoded:
        return replace(self, notes=(*self.notes, note), **changes)


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens, None = no limit, and what happens to rows beyond them; see
    `gkd.data.prepare.prepare_dataset`."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    overlong_prompt: str = "drop"
    overlong_row: str = "cut"

    def __post_init__(self) -> None:
        one_of("overlong_prompt", self.overlong_prompt, ("drop", "keep_start", "keep_end"))
        one_of("overlong_row", self.overlong_row, ("cut", "drop"))
        for name in ("max_length", "max_prompt_length"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)

    def fit(self, row: Encoded, bos: int | None) -> Encoded:
        """The row within the limits, or with a note from `gkd.data.row_report.DROPPED`."""
        row = self._fit_prompt(row, bos)
        dropped = "prompt_too_long" in row.notes
        if dropped or self.max_length is None or len(row.input_ids) <= self.max_length or row.prompt_only:
            return row
        if row.prompt_length >= self.max_length:
            return row.noted("no_room")
        if self.overlong_row == "drop":
            return row.noted("row_too_long")
        return row.noted("row_cut", input_ids=row.input_ids[: self.max_length], labels=row.labels[: self.max_length])

    def _fit_prompt(self, row: Encoded, bos: int | None) -> Encoded:
        limit, length = self.max_prompt_length, row.prompt_length
        if limit is None or max(length, len(row.prompt)) <= limit:
            return row
        if self.overlong_prompt == "drop":
            return row.noted("prompt_too_long")
        places = self._kept(row.input_ids[:length], limit, bos)
        kept = [*places, *range(length, len(row.input_ids))]
        ids, labels = [row.input_ids[i] for i in kept], [row.labels[i] for i in kept]
        prompt = [row.prompt[i] for i in self._kept(row.prompt, limit, bos)]
        row = row.noted("prompt_cut", input_ids=ids, labels=labels, prompt_length=len(places))
        return row.starting_from(prompt)

    def _kept(self, prompt: list[int], limit: int, bos: int | None) -> list[int]:
        """Which places of a prompt stay within the limit."""
        length = len(prompt)
        if length <= limit or self.overlong_prompt == "keep_start":
            return list(range(min(length, limit)))
        head = [0] if prompt[0] == bos and limit > 1 else []  # the one BOS stays in front
        return head + list(range(length - limit + len(head), length))


@dataclass(frozen=True)
class Answers:
    """Which answers of a row are trained on.

    Attributes:
        assistant_turns: of a chat, the "last" assistant turn, or "all" of them.
        unanswered_rows: where answers are needed, "cut" a chat that ends with a question behind its last answer, or
            "drop" rows that end without one.

    Raises:
        ValueError: an unknown choice.
    """

    assistant_turns: str = "last"
    unanswered_rows: str = "cut"

    def __post_init__(self) -> None:
        one_of("assistant_turns", self.assistant_turns, ("last", "all"))
        one_of("unanswered_rows", self.unanswered_rows, ("cut", "drop"))

    @property
    def all_turns(self) -> bool:
        return self.assistant_turns == "all"
