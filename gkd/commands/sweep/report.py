"""What a sweep leaves: JSON, Parquet, a plot with intervals, a page of Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure
from rich.table import Table

from gkd.commands.sweep.comparison import Comparison, Line
from gkd.commands.sweep.outcome import Outcome, numbers
from gkd.commands.sweep.statistics import Stat
from gkd.common.disk import replacing, write_whole
from gkd.common.text import duration
from gkd.recipe.report import HEADLINES
from gkd.report.comparison import GOAL_SIGNS
from gkd.report.markdown import fenced, inline_code, markdown_table
from gkd.report.plots import COLOURS

_REMEDY = "Make room and start the sweep again: the runs are kept"
_HOW = (
    "± is one standard error over seeds. The difference is to the first cell, paired by seed. A measure is lower the "
    "better (↓), higher (↑), or the nearer the teacher (≈). `eval_loss` is each cell's own loss: between cells whose "
    "losses differ it says nothing, the other measures do."
)
_SECONDS = "Seconds are of the training alone, on this machine, without the evaluations along it."
LATE = "Runs of {} were not yet evaluated by then: evaluate more often, and from the start (eval_on_start=true)."
FILES = ("results.json", "results.parquet", "plot.png", "report.md")


@dataclass(frozen=True)
class Swept:
    """A sweep's results."""

    command: str
    seeds: list[int]
    cells: list[str]
    jobs: int
    outcomes: list[Outcome]  # of the table's runs
    tuning: list[Outcome]
    tuned: dict[str, str]  # by cell: what was chosen, and by what
    failed: dict[str, list[str]]  # by run: how it ended, and its last words
    comparisons: list[Comparison] = field(default_factory=list)


def write(folder: Path, swept: Swept) -> None:
    """All files, each whole or not there."""
    runs = [*swept.outcomes, *swept.tuning]
    fields = dict.fromkeys(name for run in runs for name in run["values"])  # arms need not have the same ones
    rows = [fields | row for run in runs for row in numbers(run)]
    about = {name: value for name, value in vars(swept).items() if name not in ("comparisons", "outcomes", "tuning")}
    content = {
        **about,
        "comparisons": [one.as_dict() for one in swept.comparisons],
        "runs": runs,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "results.json", text.encode(), "the results", _REMEDY)
    if rows:
        with replacing(folder / "results.parquet", "the results", _REMEDY) as temporary:
            Dataset.from_list(rows).to_pandas().to_parquet(temporary)  # pandas shows no bar
    figure = plot(swept.comparisons)
    if figure is not None:
        with replacing(folder / "plot.png", "the plot", _REMEDY) as temporary:
            figure.savefig(temporary, format="png")
    write_whole(folder / "report.md", page(swept, figure is not None).encode(), "the report", _REMEDY)


# ------------------------------------------------------------------------------------------------------- numbers


def number(value: float) -> str:
    return f"{value:.4g}"


def estimate(stat: Stat | None, signed: bool = False) -> str:
    """`0.121 ± 0.004`; the error's two digits say how many the mean has."""
    if stat is None:
        return "–"
    sign = "+" if signed else ""
    if not stat.error:
        return f"{stat.mean:{sign}.4g}" + ("" if stat.error is None else " ± 0")
    digits = max(0, 1 - int(f"{stat.error:e}".split("e")[1]))
    return f"{stat.mean:{sign}.{digits}f} ± {stat.error:.{digits}f}"


def heading(one: Comparison) -> str:
    unit = f", {one.unit}" if one.unit not in ("", "share") else ""
    sign = f" {GOAL_SIGNS[one.goal]}" if one.goal else ""
    return f"{one.label}{unit}{sign}"


def headlines(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """What the console and the plot show; all measures are in the report."""
    along = ("eval_loss", "steps")
    scores = [one for one in comparisons if one.key in HEADLINES]
    return [*scores, *(one for one in comparisons if one.key in along)]


# --------------------------------------------------------------------------------------------------------- views


def table(swept: Swept) -> Table:
    """The headlines for the console."""
    out = Table(title="Mean ± standard error over seeds", title_justify="left")
    for name in ("Measure", "Cell"):
        out.add_column(name, overflow="fold")
    for name in ("Seeds", "Value", "To the first, paired"):
        out.add_column(name, justify="right")
    for one in headlines(swept.comparisons):
        for i, line in enumerate(one.lines):
            first = f"{heading(one)}, {one.where}" if i == 0 else ""
            out.add_row(first, *_cells_of(line), end_section=i == len(one.lines) - 1)
    return out


def _cells_of(line: Line) -> list[str]:
    count = str(line.value.count) if line.value else "0"
    return [line.cell, count, estimate(line.value), estimate(line.difference, signed=True)]


def plot(comparisons: Sequence[Comparison]) -> Figure | None:
    """A panel for each headline: every seed as a point, the mean with its 95 % interval; None without numbers."""
    shown = [one for one in headlines(comparisons) if any(line.value for line in one.lines)]
    if not shown:
        return None
    figure = Figure(figsize=(7.2, (0.9 + 0.32 * len(shown[0].lines)) * len(shown)), dpi=150, layout="constrained")
    for place, one in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, place + 1)
        for row, line in enumerate(one.lines):
            values = list(line.by_seed.values())
            axes.plot(values, [row] * len(values), ".", color=COLOURS["before"], markersize=5)
            if line.value is not None:
                axes.errorbar(
                    line.value.mean, row, xerr=line.value.half_width, fmt="o", color=COLOURS["after"], capsize=3
                )
        axes.set_yticks(range(len(one.lines)), [line.cell for line in one.lines], fontsize=8)
        axes.set_ylim(len(one.lines) - 0.5, -0.5)
        axes.set_title(f"{heading(one)}, {one.where}", fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.3)
    return figure


def page(swept: Swept, has_plot: bool) -> str:
    """The report."""
    parts = ["# A sweep", fenced(swept.command, "bash"), *_surroundings(swept)]
    if swept.failed:
        parts.append(f"## Failed: {len(swept.failed)} runs, in no number below")
        parts += [f"{inline_code(name)}\n\n" + fenced("\n".join(words)) for name, words in swept.failed.items()]
    if swept.tuned:
        rows = [[cell, choice] for cell, choice in swept.tuned.items()]
        seeds = ", ".join(sorted({str(outcome["seed"]) for outcome in swept.tuning}))
        parts.append(f"## Tuned, on seed {seeds}, which is in no number below")
        parts.append(markdown_table(["cell", "chosen"], rows))
        parts.append("The choice was made on the same held-out rows as are measured below.")
    if not swept.comparisons:
        return "\n\n".join([*parts, "No run was finished: there is nothing to compare."]) + "\n"
    parts += ["## Results", _HOW]
    if any(one.where.endswith("seconds") for one in swept.comparisons):
        crowd = f" {swept.jobs} runs at a time shared it." if swept.jobs > 1 else ""
        parts.append(_SECONDS + crowd)
    if has_plot:
        parts.append("![The headlines, every seed as a point, means with 95 % intervals](plot.png)")
    columns = ["cell", "seeds", "mean ± s.e.", "to the first cell, paired"]
    for one in swept.comparisons:
        parts.append(f"### {heading(one)}, {one.where}")
        parts.append(markdown_table(columns, map(_cells_of, one.lines), "lrrr"))
        if one.late:
            parts.append(LATE.format("; ".join(map(inline_code, one.late))))
    return "\n\n".join(parts) + "\n"


def _surroundings(swept: Swept) -> list[str]:
    runs = [*swept.outcomes, *swept.tuning]
    if not runs:
        return []
    wall, cpu = (sum(run[name] for run in runs) for name in ("wall_seconds", "cpu_seconds"))
    rows: list[tuple[str, Any]] = [
        ("cells", len(swept.cells)),
        ("seeds", ", ".join(map(str, swept.seeds))),
        ("commit", _all_of(runs, "commit")),
        ("hardware", _all_of(runs, "hardware")),
        ("versions", _all_of([{"versions": _listed(run["versions"])} for run in runs], "versions")),
        ("time of all runs", f"{duration(wall)} ({duration(cpu)} of processors)"),
        ("at a time", swept.jobs),
    ]
    return [markdown_table(["", ""], rows)]


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _all_of(runs: Sequence[dict[str, Any]], name: str) -> str:
    """One value, or all that occurred: a sweep may go on after an upgrade or on another machine."""
    return "; ".join(dict.fromkeys(str(run[name] or "not known") for run in runs))
