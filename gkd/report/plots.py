"""Pictures of a run, from the trainer's log history and from an evaluation: PNG files for the folder and the card.

Figures are built on `matplotlib.figure.Figure` itself, which draws with Agg: no pyplot, so no global figure list, no
window, and no change to the back end or the style of a notebook that has its own. A series that was not logged is
left out; a picture with nothing in it is not written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation

History = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette, which colour-blind readers can tell apart. One colour per role, in every picture.
COLOURS = {
    "total": "#222222",
    "student": "#D55E00",
    "data": "#0072B2",
    "teacher": "#009E73",
    "before": "#9A9A9A",
    "after": "#D55E00",
    "first": "#CC79A7",
    "second": "#56B4E9",
}
SEVERAL = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # several teachers, in turn
STYLES = {"total": "-", "student": "-", "data": "--", "teacher": "-.", "first": "-", "second": "--"}
SMOOTH_FROM = 60  # points in a series from which on a running mean is drawn over the raw line
BAR_KEYS = (  # the measures of the before/after picture, as in gkd.evaluation.measures.METRICS
    "divergence_own",
    "divergence_teacher_text",
    "exposure_gap",
    "perplexity",
    "agreement_own",
    "ended",
    "length",
    "repeated_4grams",
    "score_greedy",
    "score_sampled",
)


@dataclass(frozen=True)
class Line:
    """One curve: the metric's name in the log, its legend, its colour's role."""

    key: str
    label: str
    role: str
    colour: str | None = None  # another than the role's


LOSS_LINES = (
    Line("loss", "all sources", "total"),
    Line("loss/student", "student-written", "student"),
    Line("loss/data", "data set", "data"),
    Line("loss/teacher", "teacher-written", "teacher"),
)
LENGTH_LINES = (
    Line("rollout/length_mean/student", "mean, student-written", "student"),
    Line("rollout/length_mean/teacher", "mean, teacher-written", "teacher"),
    Line("rollout/length_max", "longest", "total"),
)
SHARE_LINES = (  # of all that was sampled, whoever wrote it: no writer's colour
    Line("rollout/truncated", "cut off at max_new_tokens", "first"),
    Line("rollout/ended", "ended with a stop token", "second"),
)
ENTROPY_LINES = (
    Line("student/entropy", "student", "student"),
    Line("teacher/entropy", "teacher", "teacher"),
)
POSITION_LINES = tuple(Line(line.key.removeprefix("loss/"), line.label, line.role) for line in LOSS_LINES[1:])
POSITION_NOTE = "pale: first third of the training, full: last third"
POSITION_MINIMUM = 8  # targets in a bucket of positions, below which its mean says little
NATS = "nats"  # the unit whose axis does not begin at 0: the gap of two entropies is what is looked at
SHARE_OF_STUDENT_LINES = (
    Line("lmbda", "lmbda", "total"),
    Line("lmbda_realised", "of the sequences", "student"),
)
CAP_LINES = (Line("max_new_tokens", "max_new_tokens", "total"),)
TEMPERATURE_LINES = (Line("temperature", "temperature", "total"),)
BETA_LINES = (Line("beta", "beta", "total"),)
AGREEMENT_LINES = (Line("student/agreement", "top-1 agreement", "student"),)


# ----------------------------------------------------------------------------------------------------- pictures


def plot_loss(history: History) -> Figure | None:
    """Loss by source over the optimizer steps, evaluation loss as points; None when nothing was logged."""
    figure, (axes,) = _figure(1)
    drawn = _draw(axes, history, LOSS_LINES)
    steps, values = series(history, "eval_loss")
    if steps:
        axes.plot(steps, values, "s", color=COLOURS["data"], markersize=5, mfc="white", label="evaluation, data set")
    if not drawn and not steps:
        return None
    _finish(axes, "Divergence by source of the sequence", "loss (nats per target token)")
    return figure


def plot_lengths(history: History) -> Figure | None:
    """Completion lengths, and below them the shares that were cut off or ended; None when nothing was logged."""
    return _panels(
        history,
        (LENGTH_LINES, "Length of sampled completions", "tokens", False),
        (SHARE_LINES, "How sampled completions end", "share of completions", True),
    )


def plot_entropy(history: History) -> Figure | None:
    """Entropies of both models on the targets, and their top-1 agreement; None when nothing was logged."""
    return _panels(
        history,
        (ENTROPY_LINES, "Entropy of the next token", NATS, False),
        (AGREEMENT_LINES, "Student and teacher rank the same token first", "share of targets", True),
    )


def plot_schedules(history: History) -> Figure | None:
    """The fields that follow a schedule; None where none does."""
    follows = any("lmbda" in entry for entry in history)  # else the realised share has nothing beside it
    return _panels(
        history,
        (SHARE_OF_STUDENT_LINES if follows else (), "Share of the student's sequences", "share of sequences", True),
        (CAP_LINES, "Most tokens of a rollout", "tokens", False),
        (TEMPERATURE_LINES, "Sampling temperature of the rollouts", "temperature", False),
        (BETA_LINES, "Interpolation of the JSD", "beta", False),
    )


def plot_teachers(history: History) -> Figure | None:
    """Divergence from each of several teachers on its own targets, and agreement with it; None without them."""
    names = dict.fromkeys(
        key.split("/")[1] for entry in history for key in entry if key.startswith("teacher/") and key.count("/") == 2
    )
    lines = {
        what: [
            Line(f"teacher/{name}/{what}", name, "total", SEVERAL[number % len(SEVERAL)])
            for number, name in enumerate(sorted(names))
        ]
        for what in ("divergence", "agreement")
    }
    return _panels(
        history,
        (lines["divergence"], "Divergence from each teacher, on its own rows", "nats per target token", False),
        (lines["agreement"], "Student and teacher rank the same token first", "share of targets", True),
    )


def plot_positions(history: History) -> Figure | None:
    """Divergence along the completion by source, in the first and in the last third of the training.

    Reads the last entry with `divergence_by_position` (`gkd.training.position_profile.PositionProfile.as_dict`); None
    without one.
    """
    profile = next((e["divergence_by_position"] for e in reversed(history) if "divergence_by_position" in e), None)
    if profile is None:
        return None
    figure, (axes,) = _figure(1)
    for line in POSITION_LINES:
        colour, style = COLOURS[line.role], STYLES[line.role]
        label: str | None = line.label
        for third, alpha, width in ((-1, None, 1.8), (0, 0.35, 1.1)):
            counts = profile["counts"][line.key][third]
            points = [i for i, count in enumerate(counts) if count >= POSITION_MINIMUM]
            places = [_centre(profile["starts"], i) for i in points]
            means = [profile["sums"][line.key][third][i] / counts[i] for i in points]
            if points:
                axes.plot(
                    places, means, style, color=colour, alpha=alpha, lw=width, marker="o", markersize=3, label=label
                )
                label = None  # one entry of the legend for both
    if not axes.lines:
        return None
    _finish(axes, "Divergence along the completion", "divergence (nats per target token)", note=POSITION_NOTE)
    axes.set_xlabel("position in the completion (token)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def plot_evaluation(comparison: Mapping[str, Any]) -> Figure | None:
    """Bars before, after, teacher with standard errors, one small panel for each measure, since units differ.

    Args:
        comparison: the dictionary of `gkd.report.comparison.as_dict`.
    """
    found = comparison.get("rows", ())
    of_each = [row["key"] for row in found if row["key"].startswith("divergence_own_")]  # of several teachers
    keys = (BAR_KEYS[0], *of_each, *BAR_KEYS[1:])
    rows = [row for key in keys for row in found if row["key"] == key and _bars(row)]
    if not rows:
        return None
    columns = min(4, len(rows))
    height = math.ceil(len(rows) / columns)
    figure = Figure(
        figsize=(2.9 * columns, 2.75 * height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    )
    for place, row in enumerate(rows, start=1):
        _bar_panel(figure.add_subplot(height, columns, place), row)
    figure.suptitle("Student before and after, teacher beside them (bars: ± one standard error)", fontsize=11)
    return figure


def write_plots(
    history: History, folder: str | Path, comparison: Mapping[str, Any] | None = None
) -> list[tuple[Path, str]]:
    """Write every picture that has something to show; returns (file, caption) in the order for the card."""
    folder = Path(folder)
    makers: list[tuple[str, str, Callable[[], Figure | None]]] = [
        ("loss.png", "Loss by source of the sequence", lambda: plot_loss(history)),
        (
            "positions.png",
            f"Divergence along the position in the completion ({POSITION_NOTE})",
            lambda: plot_positions(history),
        ),
        ("lengths.png", "Lengths of the completions and how they end", lambda: plot_lengths(history)),
        ("entropy.png", "Entropies and agreement of student and teacher", lambda: plot_entropy(history)),
        ("schedules.png", "Fields that follow a schedule", lambda: plot_schedules(history)),
        ("teachers.png", "Each teacher on its own rows", lambda: plot_teachers(history)),
        ("evaluation.png", "Before and after, with standard errors", lambda: plot_evaluation(comparison or {})),
    ]
    written = []
    for name, caption, make in makers:
        figure = make()
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name)
            written.append((folder / name, caption))
    return written


# -------------------------------------------------------------------------------------------------------- parts


def series(history: History, key: str) -> tuple[list[int], list[float]]:
    """The optimizer steps and finite values at which `key` was logged; of a step logged twice, the last value."""
    points: dict[int, float] = {}
    for entry in history:
        value, step = entry.get(key), entry.get("step")
        if isinstance(value, int | float) and isinstance(step, int) and math.isfinite(value):
            points[step] = float(value)
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over `width` values, narrower at both ends, so that it neither lags nor gets shorter."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7.2, 3.9 if panels == 1 else 3.2 * panels), dpi=150, layout="constrained")
    first = figure.add_subplot(panels, 1, 1)
    return figure, [first, *(figure.add_subplot(panels, 1, i, sharex=first) for i in range(2, panels + 1))]


def _panels(history: History, *panels: tuple[Sequence[Line], str, str, bool]) -> Figure | None:
    """Panels above one another (lines, title, unit, is a share); those without data are left out."""
    filled = [panel for panel in panels if any(series(history, line.key)[0] for line in panel[0])]
    if not filled:
        return None
    figure, axes = _figure(len(filled))
    for place, (lines, title, unit, share) in zip(axes, filled, strict=True):
        _draw(place, history, lines)
        _mark_events(place, history)
        _finish(place, title, unit, share)
    return figure


def _mark_events(axes: Axes, history: History) -> None:
    """A line where the guard against collapse acted, once for each step."""
    found = next((entry["collapse_events"] for entry in reversed(history) if "collapse_events" in entry), ())
    for number, step in enumerate(dict.fromkeys(event["step"] for event in found)):
        axes.axvline(step, color="#E69F00", linestyle=":", linewidth=1.4, label=None if number else "the guard acted")


def _draw(axes: Axes, history: History, lines: Sequence[Line]) -> bool:
    """Draw the lines that have data; a long noisy one is drawn pale, with its running mean over it."""
    drawn = False
    for line in lines:
        steps, values = series(history, line.key)
        if not steps:
            continue
        drawn = True
        colour, style = line.colour or COLOURS[line.role], STYLES.get(line.role, "-")
        marker = "o" if len(steps) <= 15 else None
        if len(steps) < SMOOTH_FROM:
            axes.plot(
                steps, values, style, color=colour, marker=marker, markersize=3.5, linewidth=1.5, label=line.label
            )
        else:
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
            smooth = running_mean(values, len(values) // 20)
            axes.plot(steps, smooth, style, color=colour, linewidth=1.7, label=line.label)
    return drawn


def _centre(starts: Sequence[int], bucket: int) -> float:
    """Where a bucket of positions is drawn: the geometric mean of its ends; the open one at its first."""
    last = starts[bucket + 1] - 1 if bucket + 1 < len(starts) else starts[bucket]
    return math.sqrt(starts[bucket] * last)


def _finish(axes: Axes, title: str, unit: str, share: bool = False, note: str = "thick: running mean") -> None:
    axes.set_title(title, fontsize=11, loc="left")
    if any(line.get_alpha() for line in axes.lines):
        axes.set_title(note, fontsize=9, loc="right", color="#555555")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if share:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        low, high = axes.dataLim.y0, axes.dataLim.y1
        if unit != NATS:
            low = min(0.0, low)
        below = 0.06 * (high - low) if low < 0 or unit == NATS else 0.0
        axes.set_ylim(low - below, high + (0.06 * (high - low) or 1.0))
    # Under the axes: a legend inside them covers a curve sooner or later. Half an inch clears tick and axis labels.
    assert axes.figure is not None
    under = axes.transAxes + ScaledTranslation(0, -0.5, axes.figure.dpi_scale_trans)
    names = axes.get_legend_handles_labels()[1]
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=under,
        borderaxespad=0.0,
        ncols=len(names),
        frameon=False,
        fontsize=9,
    )


def _bars(row: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(place, value, standard error or 0) of the bars that have a value."""
    bars = []
    for place in ("before", "after", "teacher"):
        estimate = row.get(place) or {}
        if estimate.get("value") is not None:
            bars.append((place, float(estimate["value"]), float(estimate.get("error") or 0.0)))
    return bars


def _bar_panel(axes: Axes, row: Mapping[str, Any]) -> None:
    bars = _bars(row)
    scale = 100.0 if row["unit"] == "share" else 1.0
    values = [value * scale for _, value, _ in bars]
    errors = [error * scale for _, _, error in bars]
    places = list(range(len(bars)))
    axes.bar(places, values, width=0.65, color=[COLOURS[place] for place, _, _ in bars])
    axes.errorbar(places, values, yerr=errors, fmt="none", ecolor="#222222", elinewidth=1, capsize=3)
    low, high = (
        min(v - e for v, e in zip(values, errors, strict=True)),
        max(map(sum, zip(values, errors, strict=True))),
    )
    span = max(high, 0.0) - min(low, 0.0) or 1.0
    for place, value, error in zip(places, values, errors, strict=True):
        above = value >= 0
        y = value + error + 0.02 * span if above else value - error - 0.02 * span
        axes.text(place, y, f"{value:.3g}".replace("-", "−"), ha="center", va="bottom" if above else "top", fontsize=8)
    top = max(high, 0.0) + 0.14 * span if (low, high) != (0.0, 0.0) else span  # all zero: not an axis of small parts
    axes.set_ylim(min(low, 0.0) - (0.14 * span if low < 0 else 0.0), top)
    axes.axhline(0.0, color="#222222", linewidth=0.6)
    axes.set_xticks(places, [place for place, _, _ in bars], fontsize=9)
    axes.set_title(_wrap(row["label"]), fontsize=9)
    axes.set_ylabel({"share": "%", "": ""}.get(row["unit"], row["unit"]), fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.yaxis.get_offset_text().set_fontsize(7)
    axes.spines[["top", "right"]].set_visible(False)


def _wrap(label: str, width: int = 26) -> str:
    lines = [""]
    for word in label.split():
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines, word]
    return "\n".join(lines)
