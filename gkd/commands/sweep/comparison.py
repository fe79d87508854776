"""Every measure of every cell against the base cell, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gkd.commands.sweep.budget import common_budget, value_at
from gkd.commands.sweep.outcome import Outcome
from gkd.commands.sweep.statistics import Stat, mean_of, paired

Values = dict[str, dict[int, float]]  # by cell, by seed
AFTER = "after training"


@dataclass(frozen=True)
class Line:
    """One cell's value of a measure; `difference` is to the base cell, None for the base itself."""

    cell: str
    value: Stat | None
    difference: Stat | None
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Comparison:
    """One measure of all cells. `where`: after training, or the budget at which all were compared."""

    key: str
    label: str
    unit: str
    goal: str  # "" where none is known
    where: str
    lines: list[Line]
    late: tuple[str, ...] = ()  # cells of which a run was first evaluated after the budget: its value is missing

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(cells: Sequence[str], outcomes: Sequence[Outcome], at: Sequence[str]) -> list[Comparison]:
    """The first cell is the base. At equal steps: what the harness measured after training, and the evaluations along
    the runs at the last step that all have reached. At equal seconds: the latter at the last second."""
    found = _after(cells, outcomes) if "steps" in at else []
    for axis in at:
        found += _along(cells, outcomes, axis)
    return found


def _after(cells: Sequence[str], outcomes: Sequence[Outcome]) -> list[Comparison]:
    steps = sorted({outcome["steps"] for outcome in outcomes})
    where = AFTER if len(steps) < 2 else f"{AFTER}, of {steps[0]} to {steps[-1]} steps"
    about: dict[str, Mapping[str, Any]] = {}
    for outcome in outcomes:
        about = {**outcome["measures"], **about}
    found = []
    for key, measure in about.items():
        values: Values = {}
        for outcome in outcomes:
            value = outcome["measures"].get(key, {}).get("after")
            if value is not None:
                values.setdefault(outcome["cell"], {})[outcome["seed"]] = value
        label, unit, goal = measure["label"], measure["unit"], measure["goal"]
        found.append(Comparison(key, label, unit, goal, where, _lines(cells, values)))
    return found


def _along(cells: Sequence[str], outcomes: Sequence[Outcome], axis: str) -> list[Comparison]:
    budget = common_budget([outcome["curve"] for outcome in outcomes], axis)
    if budget is None:
        return []
    where = f"at {budget:g} steps" if axis == "steps" else f"at {budget:.1f} seconds"
    names = list(dict.fromkeys(name for outcome in outcomes for point in outcome["curve"] for name in point))
    names = [name for name in names if name not in ("steps", "seconds")]
    names += ["steps"] if axis == "seconds" else ["seconds"]  # what the other one was by then
    found = []
    for name in names:
        values: Values = {}
        for outcome in outcomes:
            value = value_at(outcome["curve"], axis, budget, name)
            if value is not None and math.isfinite(value):
                values.setdefault(outcome["cell"], {})[outcome["seed"]] = value
        label = f"{name} by then" if name in ("steps", "seconds") else name
        goal = "lower" if name == "eval_loss" else ""
        late = [run["cell"] for run in outcomes if run["seed"] not in values.get(run["cell"], {})]
        lines = _lines(cells, values)
        found.append(Comparison(name, label, "", goal, where, lines, tuple(dict.fromkeys(late))))
    return found


def _lines(cells: Sequence[str], values: Values) -> list[Line]:
    base = values.get(cells[0], {})
    lines = []
    for cell in cells:
        own = values.get(cell, {})
        difference = None if cell == cells[0] else paired(own, base)
        lines.append(Line(cell, mean_of(list(own.values())), difference, own))
    return lines
