"""What a run had reached at a step or a second, and the most that all runs have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

AXES = ("steps", "seconds")
_NO_MEASURE = re.compile(r"_(runtime|samples_per_second|steps_per_second|time/run)$")
_RUNTIME = re.compile(r"^eval_(\w+_)?runtime$")
Curve = list[dict[str, float]]  # points with `steps`, `seconds` and the measures of the evaluation there


def curve_of(history: Iterable[Mapping[str, Any]]) -> Curve:
    """The evaluations along a run, from its log. Seconds are of the training: those of the evaluations themselves are
    taken off, so that how often one looks is no part of the comparison; with an evaluation before the first step they
    begin there."""
    points: dict[float, dict[str, float]] = {}
    evaluating = setup = 0.0
    for entry in history:
        evaluating += sum(float(value) for name, value in entry.items() if _RUNTIME.match(name))
        measures = {name: float(value) for name, value in entry.items() if _is_measure(name, value)}
        if measures and "eval_time/run" in entry:
            if entry["step"] == 0:
                setup = float(entry["eval_time/run"]) - evaluating
            seconds = max(0.0, float(entry["eval_time/run"]) - evaluating - setup)
            point = points.setdefault(float(entry["step"]), {"steps": float(entry["step"])})
            point.update(measures, seconds=seconds)
    return list(points.values())


def _is_measure(name: str, value: Any) -> bool:
    # eval_before/..., eval_after/... are the harness's, before and after the training
    along = name.startswith("eval_") and not name.startswith(("eval_before/", "eval_after/", "eval_teacher/"))
    return along and not _NO_MEASURE.search(name) and isinstance(value, int | float)


def common_budget(curves: Sequence[Curve], axis: str) -> float | None:
    """The most that every run has reached on an axis; None when a run was not evaluated on its way."""
    if not curves or not all(curves):
        return None
    return min(curve[-1][axis] for curve in curves)


def value_at(curve: Curve, axis: str, budget: float, name: str) -> float | None:
    """A measure at a budget, on the straight line between the evaluations before and after it; None outside them."""
    points = [(point[axis], point[name]) for point in curve if name in point]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= budget <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (budget - x0) / (x1 - x0)
    return points[0][1] if len(points) == 1 and points[0][0] == budget else None
