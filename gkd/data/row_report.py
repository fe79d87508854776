"""What became of a data set's rows: kept, dropped, cut, noted, and what in them nothing reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from gkd.common.text import printable
from gkd.data.encoded import Limits

DROPPED = {
    "prompt_too_long": "dropped: the prompt is longer than max_prompt_length={max_prompt_length}",
    "row_too_long": "dropped: the row is longer than max_length={max_length}",
    "no_room": "dropped: the prompt alone fills max_length={max_length}",
    "empty_answer": "dropped: the answer is empty",
    "untrained": "dropped: flags say that no answer of it is to be trained on",
    "masked": "dropped: the mask beside its input_ids is 0 everywhere",
    "unanswered": "dropped: it ends without an answer (unanswered_rows=drop)",
}
# Of these, the ones that lie in the answer alone: where no answer is taken from the data the row is a prompt.
OF_THE_ANSWER = {"row_too_long", "no_room", "empty_answer", "untrained"}
NOTES_OF_THE_ANSWER = {"eos_appended", "prompt_not_prefix", "turn_not_found", "prompt_twice"}
NOTES_OF_THE_ANSWER |= {"answer_shortened", "thought_left_out", "empty_thought"}
VIEW = "teacher_view"  # the note of a row of which the teacher reads a prompt of its own
MIXED_FROM = "mixed_from"  # a mixture's column of which of its data sets a row is
UNREAD = "unread:"  # before the name of a column that nothing reads, as a note of a row
NOTES = {
    "question_left_out": "cut: what stands behind the last answer, a question without one",
    "prompt_cut": "cut: the prompt was longer than max_prompt_length={max_prompt_length} ({overlong_prompt})",
    "row_cut": "cut: the end of the answer, the row was longer than max_length={max_length}",
    "prompt_not_prefix": "note: the prompt is not a prefix of the row, whose targets begin where the two part",
    "turn_not_found": "note: an earlier assistant turn is not trained on, the chat template does not show where it is",
    "prompt_repeated": "note: the completion repeats the prompt, which was left out of it",
    "prompt_twice": "note: the completion begins with the prompt, which stands in the row twice",
    "flag_not_honoured": "note: flagged as to be trained on, but not trained on: a turn of a user, or in `prompt`",
    "eos_appended": "note: the chat template does not end answers with a stop token; one was appended",
    "tools_left_out": "note: the chat template leaves out: tools",
    "calls_left_out": "note: the chat template leaves out: tool_calls",
    "thought_left_out": "note: the chat template leaves out: the answer's reasoning_content or thinking",
    "content_left_out": "note: the chat template leaves out: the content of a turn",
    "options_left_out": "note: the chat template does not know: something in chat_template_kwargs",
    "answer_shortened": "note: the chat template leaves out a part of the answer, which is not trained on (a thought? "
    "Give it as reasoning_content, or take another template with chat_template_path)",
    "empty_thought": "note: the chat template puts an empty thought before the answer, which is trained on (give "
    "chat_template_kwargs {{'enable_thinking': false}} if it knows that)",
}
_ROWS_AT_A_TIME = 10_000
NAMED = 10  # row numbers named per line of a report


@dataclass
class DataReport:
    """What became of a data set's rows. `rows_with` maps each key of DROPPED and NOTES to row numbers (all of them);
    `unread` maps columns, and keys of turns, that hold something which nothing reads; token counts are of the kept
    rows, and so are `views`, the rows of which the teacher reads a prompt of its own, and `mixed_from`, those of each
    data set of a mixture."""

    name: str
    limits: Limits
    rows: int = 0
    kept: int = 0
    prompt_only: int = 0
    prompt_tokens: int = 0
    target_tokens: int = 0
    longest_prompt: int = 0
    longest_row: int = 0
    views: int = 0
    mixed_from: dict[str, int] = field(default_factory=dict)
    rows_with: dict[str, list[int]] = field(default_factory=dict)
    unread: dict[str, list[int]] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        return self.rows - self.kept

    def __str__(self) -> str:
        lines = [
            f"{self.name} data set: {self.kept:,} of {self.rows:,} rows kept"
            + (f", {self.prompt_only:,} of them prompts only" if self.prompt_only else ""),
            f"  {self.target_tokens:,} target tokens, {self.prompt_tokens:,} prompt tokens; longest prompt "
            f"{self.longest_prompt:,}, longest row {self.longest_row:,}",
        ]
        if self.mixed_from:
            shares = (f"{number:,} of {name} ({number / self.kept:.1%})" for name, number in self.mixed_from.items())
            lines.append(f"  a mixture: {', '.join(shares)}")
        if self.views:
            lines.append(f"  in {self.views:,} of them the teacher reads a prompt of its own")
        return "\n".join(lines + [f"  {line}" for line in self.remarks()])

    def remarks(self) -> list[str]:
        """One line per reason, with the number of rows and the first of their row numbers."""
        lines = [
            f"{len(rows):,} {text.format(**vars(self.limits))}: {row_numbers(rows)}"
            for key, text in {**DROPPED, **NOTES}.items()
            if (rows := self.rows_with.get(key))
        ]
        if self.unread:
            where = {
                column: "all rows" if len(rows) == self.rows else row_numbers(rows)
                for column, rows in self.unread.items()
            }
            named = "; ".join(f"{printable(column)} ({rows})" for column, rows in sorted(where.items()))
            lines.append(f"note: nothing reads {named}")
        return lines


def row_numbers(rows: list[int]) -> str:
    """The first of some row numbers, as words."""
    more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:NAMED]))}{more}"


def _note(report: DataReport, notes: list[str], number: int) -> None:
    for note in notes:
        if note.startswith(UNREAD):
            report.unread.setdefault(note.removeprefix(UNREAD), []).append(number)
        elif note != VIEW:
            report.rows_with.setdefault(note, []).append(number)


def read_notes(encoded: Dataset, report: DataReport) -> tuple[list[int], list[int], DataReport]:
    """Fills in the report; also the numbers of the kept rows, and of those among them that have no answer."""
    kept: list[int] = []
    prompt_only: list[int] = []
    columns = encoded.select_columns(["notes", "targets", "length", "served"]).with_format("arrow")
    first = 0
    for batch in columns.iter(_ROWS_AT_A_TIME):
        notes = batch["notes"].combine_chunks()
        used = np.ones(len(notes), dtype=bool)
        for place in np.flatnonzero(pc.fill_null(pc.list_value_length(notes), 0)):
            of_row = notes[int(place)].as_py()
            _note(report, of_row, first + int(place))
            used[place] = not DROPPED.keys() & set(of_row)
            report.views += bool(used[place] and VIEW in of_row)
        targets, length, served = (np.asarray(batch[name])[used] for name in ("targets", "length", "served"))
        rows = first + np.flatnonzero(used)
        kept += rows.tolist()
        prompt_only += rows[targets == 0].tolist()
        report.target_tokens += int(targets.sum())
        report.prompt_tokens += int(served.sum())
        report.longest_prompt = max(report.longest_prompt, int(served.max(initial=0)))
        report.longest_row = max(report.longest_row, int(length.max(initial=0)))
        first += len(notes)
    report.kept, report.prompt_only = len(kept), len(prompt_only)
    return kept, prompt_only, report
