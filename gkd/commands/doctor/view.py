"""What the doctor shows: the checklist, and rows with their prompt, target and stop tokens in colour."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gkd.common.redact import harmless
from gkd.common.sign_of_life import above_the_bars
from gkd.common.text import printable
from gkd.data.message_bytes import MessageBytes
from gkd.data.sequences import sequence_of
from gkd.data.targets import IGNORE

LEVELS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "bold red")}
KINDS = {"prompt": "cyan", "target": "green", "stop": "bold white on red", "untrained": "dim"}
# Where there are no colours (a file, NO_COLOR): brackets that hardly any text holds.
MARKS = {"prompt": ("", ""), "target": ("⟦", "⟧"), "stop": ("⟪", "⟫"), "untrained": ("⟨", "⟩")}
_SHOWN = 600  # characters of one piece of a row
_GROUPS, _GROUP_WIDTH = 40, 66  # groups of a row that are shown, and columns of a line of them

Pieces = tuple[list[str], list[str]]  # tokens of the student and of the teacher that are the same text


@dataclass(frozen=True)
class Check:
    """One line of the checklist. `level` is a key of LEVELS; `remedy` says what to do, "" when there is nothing."""

    name: str
    level: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class RowView:
    """A row as pieces of text, each with a kind of KINDS; `teacher` is the same of what the teacher reads, empty where
    that is what the student reads. `groups` are its completion in the tokens of both, where these differ and are
    compared."""

    number: int
    pieces: list[tuple[str, str]]
    teacher: list[tuple[str, str]] = field(default_factory=list)
    groups: list[Pieces] = field(default_factory=list)


@dataclass
class Diagnosis:
    """What was found. `rollouts` are (prompt, completion) of the student; `questions` their prompts' last turns.

    With a `console` each finding is printed as soon as it is known."""

    checks: list[Check] = field(default_factory=list)
    rows: list[RowView] = field(default_factory=list)
    rollouts: list[tuple[str, str]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    console: Console | None = None

    @property
    def passed(self) -> bool:
        return all(check.level != "error" for check in self.checks)

    def add(self, name: str, level: str, message: str, remedy: str = "") -> None:
        assert level in LEVELS, level
        self.checks.append(Check(name, level, message, remedy))
        self._show(lambda console: console.print(_line(self.checks[-1])))

    def add_rows(self, rows: list[RowView]) -> None:
        self.rows.extend(rows)
        self._show(lambda console: _show_rows(self, console))

    def add_rollouts(self, rollouts: Sequence[tuple[str, str]], questions: Sequence[str]) -> None:
        self.rollouts.extend(rollouts)
        self.questions.extend(questions)
        self._show(lambda console: _show_rollouts(self, console))

    def doing(self, what: str) -> None:
        """Say what takes a while now, to whoever watches."""
        self._show(lambda console: console.print(Text(f"  {what} ...", style="dim")))

    def _show(self, show: Callable[[Console], None]) -> None:
        if self.console is not None:
            with above_the_bars():
                show(self.console)

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "rows": [asdict(row) for row in self.rows],
            "rollouts": [{"prompt": prompt, "completion": completion} for prompt, completion in self.rollouts],
        }


@dataclass(frozen=True)
class Reader:
    """Who reads a row: its tokenizer, the ids at which it stops, and whether it reads prompts alone."""

    tokenizer: PreTrainedTokenizerBase | MessageBytes
    stop_ids: Collection[int]
    prompts_only: bool = False


def view(
    row: Mapping[str, Any], student: Reader, teacher: Reader | None = None, end_map: tuple[int, int] | None = None
) -> RowView:
    """A prepared row (`input_ids`, `labels`, `prompt_length`, `row`) as pieces of text.

    Args:
        row: with what its teacher reads, where that is something else.
        student, teacher: who reads it; no teacher reads as the student does.
        end_map: the tokens that end a turn of the student's and of the teacher's, where they differ.
    """
    sequence = sequence_of(row, end_map)
    own = _pieces(sequence.input_ids, sequence.labels, sequence.prompt_length, student)
    read: list[tuple[str, str]] = []
    if teacher is not None and teacher.prompts_only:
        prompt = sequence.teacher_prompt
        read = _pieces(prompt, [IGNORE] * len(prompt), len(prompt), teacher)
    elif sequence.has_view or sequence.teacher_prompt_ids:
        seen = sequence.as_the_teacher_reads_it()
        read = _pieces(seen.input_ids, seen.labels, seen.prompt_length, teacher or student)
    return RowView(sequence.row, own, read)


def _pieces(ids: list[int], labels: list[int], prompt_length: int, reader: Reader) -> list[tuple[str, str]]:
    kinds = []
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label != IGNORE:
            kinds.append("stop" if token in reader.stop_ids else "target")
        else:
            kinds.append("prompt" if position < prompt_length else "untrained")
    pieces = []
    for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        text = reader.tokenizer.decode([token for _, token in group], skip_special_tokens=False)
        pieces.append((kind, str(text)))
    return pieces


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print the rows, a few rollouts and the checklist."""
    _show_rows(diagnosis, console)
    _show_rollouts(diagnosis, console)
    for check in diagnosis.checks:
        console.print(_line(check))
    show_counts(diagnosis, console)


def _show_rows(diagnosis: Diagnosis, console: Console) -> None:
    marked = console.color_system is None or console.no_color
    marks = MARKS if marked else dict.fromkeys(KINDS, ("", ""))
    for row in diagnosis.rows:
        text: Text | Table = _coloured(row.pieces, marks)
        if row.teacher:
            sides = Table(expand=True, box=None, padding=(0, 1))
            for heading in ("the student reads", "the teacher reads"):
                sides.add_column(heading, ratio=1, overflow="fold", header_style="bold")
            sides.add_row(text, _coloured(row.teacher, marks))
            text = sides
        console.print(Panel(text, title=f"row {row.number}", title_align="left"))
        if row.groups:
            console.print(Text(groups_in_lines(row.groups)))
    if any(row.groups for row in diagnosis.rows):
        console.print(Text("│ both tokenizers have a border here, · one of them; – is not compared", style="dim"))
    if diagnosis.rows:
        legend = Text("marks: " if marked else "colours: ")
        for kind, style in KINDS.items():
            legend.append(f" {kind.join(marks[kind])} ", style=style)
        console.print(legend)


def groups_in_lines(groups: Sequence[Pieces], width: int = _GROUP_WIDTH) -> str:
    """Two lines, one above the other: what stands between two borders is the same text in the tokens of both."""
    cells = [tuple(_visible(side) for side in pieces) for pieces in groups[:_GROUPS]]
    blocks: list[list[tuple[str, str]]] = [[]]
    for own, other in cells:
        used = sum(max(map(len, cell)) + 1 for cell in blocks[-1])
        if blocks[-1] and used + max(len(own), len(other)) > width:
            blocks.append([])
        blocks[-1].append((own, other))
    lines = []
    for block in blocks:
        for side, name in enumerate(("student", "teacher")):
            line = "│".join(cell[side].ljust(max(map(len, cell))) for cell in block)
            lines.append(f"  {name} │{line}│")
    more = len(groups) - len(cells)
    return "\n".join([*lines, *([f"  and {more} more groups"] if more > 0 else [])])


def _visible(pieces: Sequence[str]) -> str:
    """Tokens with what cannot be seen written out."""
    return "·".join(printable(piece.replace("\n", "⏎").replace(" ", "␣")) for piece in pieces) or "–"


def _coloured(pieces: list[tuple[str, str]], marks: Mapping[str, tuple[str, str]]) -> Text:
    text = Text()
    for kind, piece in pieces:
        before, behind = marks[kind]
        text.append(before + printable(_shortened(piece)) + behind, style=KINDS[kind])
    return text


def _show_rollouts(diagnosis: Diagnosis, console: Console) -> None:
    if not diagnosis.rollouts:
        return
    table = Table(title="Rollouts of the student", title_justify="left", show_lines=True)
    for heading in ("Prompt (end)", "Completion"):
        table.add_column(heading, ratio=1)
    prompts = diagnosis.questions or [prompt for prompt, _ in diagnosis.rollouts]
    for prompt, (_, completion) in list(zip(prompts, diagnosis.rollouts, strict=True))[:3]:
        table.add_row(Text(printable(prompt[-_SHOWN // 2 :])), Text(printable(_shortened(completion))))
    console.print(table)


def show_counts(diagnosis: Diagnosis, console: Console) -> None:
    """The last line: how many checks are ok, warnings, errors."""
    counts = [f"{sum(check.level == level for check in diagnosis.checks)} {level}" for level in LEVELS]
    console.print(Text(", ".join(counts), style="bold"))


def _line(check: Check) -> Group:
    sign, style = LEVELS[check.level]
    line = Table.grid(padding=(0, 1))
    line.add_column(width=1)
    line.add_column(width=20)
    line.add_column(ratio=1, overflow="fold")
    line.add_row(Text(sign, style=style), Text(printable(check.name)), Text(harmless(check.message)))
    if check.remedy:
        line.add_row("", "", Text(f"→ {harmless(check.remedy)}", style=style))
    return Group(line)


def _shortened(text: str) -> str:
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} […] {text[-half:]}"
