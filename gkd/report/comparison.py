"""The student before and after training, the teacher beside them: a table for the console, Markdown, and plain values.

All models were measured on the same prompts, so a change is judged by the paired residuals of the two estimates,
which is a good deal sharper than adding the two standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from gkd.common.text import printable, shorten
from gkd.evaluation.measures import METRICS, Estimate, Measures, Metric, difference_estimate, finite
from gkd.report.markdown import escape_cell, markdown_table

GOAL_SIGNS = {"lower": "↓", "higher": "↑", "teacher": "≈"}
LEGEND = "↓ lower is better, ↑ higher is better, ≈ the nearer the teacher the better; ± one standard error"
MEASURE_WIDTH = 15  # of the first column: its longest word and a little
VERDICT_WIDTH = 10  # so that all columns fit into 80
CAPPED = ("ended", "length")  # what max_new_tokens decides where most completions reach it
CAPPED_NOTE = "cut off: most completions reach max_new_tokens, which then decides this number"


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of the three models. `verdict` is `"better"`, `"worse"`, `"same"` or, lacking a value, `"unknown"`.

    `clear` says whether the change exceeds two standard errors of the paired difference; None without an error.
    `capped`: it would be "better", but most completions of the student or of the teacher were cut off, so that
    nearness to the teacher is the cap's; the verdict is "unknown" then.
    """

    metric: Metric
    before: Estimate | None
    after: Estimate | None
    teacher: Estimate | None
    difference: float | None
    difference_error: float | None
    verdict: str
    clear: bool | None
    capped: bool = False

    @property
    def improved(self) -> bool | None:
        return None if self.verdict == "unknown" else self.verdict == "better"


def compare(
    before: Measures, after: Measures, teacher: Measures | None = None, keys: Sequence[str] | None = None
) -> list[ComparedMetric]:
    """One row for each metric that was measured before or after, in the order of METRICS (or of `keys`).

    Raises:
        ValueError: a key that is no metric.
    """
    known = {**METRICS, **before.extra, **after.extra}
    unknown = [key for key in keys or () if key not in known]
    if unknown:
        raise ValueError(f"keys: {unknown} are no metrics; choose from {list(known)}")
    chosen = [key for key in dict.fromkeys(keys or known) if key in before.values or key in after.values]
    capped = any(_mostly_cut_off(model) for model in (after, teacher) if model is not None)
    rows = [
        _row(known[key], *(model.values.get(key) if model else None for model in (before, after, teacher)))
        for key in chosen
    ]
    return [
        replace(row, verdict="unknown", capped=True)
        if capped and row.metric.key in CAPPED and row.verdict == "better"
        else row
        for row in rows
    ]


def _mostly_cut_off(model: Measures) -> bool:
    ended = model.values.get("ended")
    return ended is not None and ended.value < 0.5


def _row(metric: Metric, before: Estimate | None, after: Estimate | None, teacher: Estimate | None) -> ComparedMetric:
    if before is None or after is None or not math.isfinite(after.value - before.value):
        return ComparedMetric(metric, before, after, teacher, None, None, "unknown", None)
    change = difference_estimate(after, before)
    gain = _gain(metric.goal, before.value, after.value, teacher.value if teacher else math.nan)
    clear = None if change.error is None else abs(change.value) > 2 * change.error
    if math.isnan(gain):
        verdict = "unknown"
    elif gain == 0:
        verdict = "same"
    else:
        verdict = "better" if gain > 0 else "worse"
    return ComparedMetric(metric, before, after, teacher, change.value, change.error, verdict, clear)


def _gain(goal: str, before: float, after: float, teacher: float) -> float:
    """Positive when `after` is nearer the goal than `before`."""
    if goal == "teacher":
        return abs(before - teacher) - abs(after - teacher)
    return before - after if goal == "lower" else after - before


def format_estimate(metric: Metric, estimate: Estimate | None) -> str:
    """`0.412 ± 0.013`, a share as `41.2 % ± 1.3`, from ten thousand on `150.7k ± 1.2k`, an absent value as a dash."""
    if estimate is None or math.isnan(estimate.value):
        return "–"
    scale, unit = (100.0, " %") if metric.unit == "share" else (1.0, "")
    value, error = estimate.value * scale, estimate.error
    if not unit and abs(value) >= 1e4:
        return _format_large(value, error)
    digits = 1 if unit or abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    digits -= abs(value) >= 1000
    text = f"{value:.{digits}f}{unit}"
    return text if error is None else f"{text} ± {error * scale:.{digits}f}"


def _format_large(value: float, error: float | None) -> str:
    """`150.7k ± 1.2k`, `3.21M`: six digits and more would not leave the table a first column."""
    if math.isinf(value) or abs(value) >= 1e9:
        return f"{value:.3g}" if error is None or math.isinf(value) else f"{value:.3g} ± {error:.1g}"
    size, letter = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
    largest = max(abs(value), error or 0.0) / size
    digits = 2 if largest < 10 else 1 if largest < 1000 and (error or 0.0) < 10 * size else 0
    text = f"{value / size:.{digits}f}{letter}"
    return text if error is None else f"{text} ± {error / size:.{digits}f}{letter}"


def format_verdict(row: ComparedMetric) -> str:
    """`yes`, `no`, `same` or a dash; a change within two standard errors says so, as does one that is the cap's."""
    if row.capped:
        return "– (cut off)"
    word = {"better": "yes", "worse": "no", "same": "same", "unknown": "–"}[row.verdict]
    return f"{word} (within noise)" if row.clear is False and row.verdict in ("better", "worse") else word


def format_label(metric: Metric) -> str:
    unit = f", {metric.unit}" if metric.unit not in ("", "share") else ""
    return f"{metric.label}{unit} {GOAL_SIGNS[metric.goal]}"


def footnotes(settings: Mapping[str, Any], capped: bool = False) -> list[str]:
    """What a table's signs mean, and how its numbers were measured."""
    how = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    return [LEGEND, *([CAPPED_NOTE] if capped else []), *([f"Measured with: {how}"] if how else [])]


def table(
    before: Measures, after: Measures, teacher: Measures | None = None, keys: Sequence[str] | None = None
) -> Table:
    """The comparison for the console, a colour on each verdict."""
    rows = compare(before, after, teacher, keys)
    caption = "\n".join(footnotes(after.settings, any(row.capped for row in rows)))
    out = Table(title="Student before and after, teacher beside them", title_justify="left", caption=Text(caption))
    out.add_column("Measure", min_width=MEASURE_WIDTH)
    for heading in (before.name, after.name, teacher.name if teacher else "teacher"):
        out.add_column(Text(heading.replace(" ", "\n")), justify="right", no_wrap=True)
    out.add_column("Improved", max_width=VERDICT_WIDTH)
    colours = {"better": "green", "worse": "red"}
    for row in rows:
        cells = [Text(format_estimate(row.metric, est)) for est in (row.before, row.after, row.teacher)]
        out.add_row(
            Text(format_label(row.metric)), *cells, Text(format_verdict(row), style=colours.get(row.verdict, ""))
        )
    return out


def samples_table(before: Measures, after: Measures, limit: int = 400) -> Table:
    """Sample completions before and after, each text cut at `limit` characters."""
    out = Table(title="Sample completions", title_justify="left", show_lines=True)
    for heading in ("Prompt (end)", before.name, after.name):
        out.add_column(Text(heading), ratio=1)
    questions = before.questions or [prompt for prompt, _ in before.samples]
    for prompt, (_, old), (_, new) in zip(questions, before.samples, after.samples, strict=False):
        out.add_row(
            Text(printable(prompt[-limit:])),
            Text(shorten(printable(old), limit)),
            Text(shorten(printable(new), limit)),
        )
    return out


def as_dict(
    before: Measures, after: Measures, teacher: Measures | None = None, keys: Sequence[str] | None = None
) -> dict[str, Any]:
    """The whole comparison as plain values: what `evaluation.json` holds and what the card and the plots read."""
    models = {"before": before, "after": after} | ({"teacher": teacher} if teacher else {})
    return {
        "models": {place: model.name for place, model in models.items()},
        "settings": after.settings,
        "rows": [_row_dict(row) for row in compare(before, after, teacher, keys)],
        "samples": [_sample_dict(models, i) for i in range(len(before.samples))],
    }


def _sample_dict(models: Mapping[str, Measures], i: int) -> dict[str, str]:
    """The i-th sample prompt and each model's completion of it."""
    texts = {place: model.samples[i][1] for place, model in models.items() if i < len(model.samples)}
    return {"prompt": models["before"].samples[i][0], **texts}


def _row_dict(row: ComparedMetric) -> dict[str, Any]:
    estimates = {"before": row.before, "after": row.after, "teacher": row.teacher}
    return {
        "key": row.metric.key,
        "label": row.metric.label,
        "unit": row.metric.unit,
        "goal": row.metric.goal,
        **{place: est.as_dict() if est else None for place, est in estimates.items()},
        "difference": finite(row.difference),
        "difference_error": finite(row.difference_error),
        "verdict": row.verdict,
        "improved": row.improved,
        "clear": row.clear,
        "capped": row.capped,
        "text": {place: format_estimate(row.metric, est) for place, est in estimates.items()},
        "text_label": format_label(row.metric),
        "text_verdict": format_verdict(row),
    }


def as_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison of :func:`as_dict` as a GitHub table, its signs explained below it."""
    places = ("before", "after", "teacher")
    heading = ["Measure", *(comparison["models"].get(place, place) for place in places), "Improved"]
    rows = [
        [row["text_label"], *(row["text"][place] for place in places), row["text_verdict"]]
        for row in comparison["rows"]
    ]
    notes = footnotes(comparison.get("settings") or {}, any(row.get("capped") for row in comparison["rows"]))
    return markdown_table(heading, rows, "lrrrl") + "".join(f"\n\n{escape_cell(note)}." for note in notes)
