"""A finished run's numbers, kept so that it is read the next time, not run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gkd.commands.sweep.budget import curve_of
from gkd.common.disk import write_whole
from gkd.common.environment import describe_hardware, installed_versions

Outcome = dict[str, Any]
_PLACES = ("before", "after", "teacher")


def read_output(folder: Path) -> Outcome:
    """What a run left in its output folder.

    Raises:
        ValueError: it left no log, so it was no run of `gkd.run.run`.
    """
    log, evaluation = folder / "metrics.jsonl", folder / "evaluation.json"
    if not log.is_file():
        raise ValueError("it ended well but left no metrics.jsonl: a recipe ends with gkd.run.run(...)")
    history = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rows = json.loads(evaluation.read_text(encoding="utf-8"))["rows"] if evaluation.is_file() else []
    curve = curve_of(history)
    return {
        "steps": max((entry.get("step", 0) for entry in history), default=0),
        "measures": {row["key"]: _measure(row) for row in rows},
        "curve": curve,
        "history": history,
    }


def _measure(row: Mapping[str, Any]) -> dict[str, Any]:
    values = {place: (row.get(place) or {}).get("value") for place in _PLACES}
    return {"label": row["label"], "unit": row["unit"], "goal": row["goal"], **values}


def keep(path: Path, outcome: Outcome) -> None:
    """Write it, whole or not at all."""
    text = json.dumps(outcome, indent=1, ensure_ascii=False)
    write_whole(path, text.encode(), "a run's numbers", "Make room and start the sweep again")


def kept(path: Path) -> Outcome | None:
    """What `keep` wrote; None when the run has not been finished."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def numbers(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """Every number of a run, one a row: who, when, which, how much."""
    who = {"cell": outcome["cell"], "seed": outcome["seed"], "tuning": outcome["tuning"], **outcome["values"]}
    for key, measure in outcome["measures"].items():
        for place in _PLACES:
            if measure[place] is not None:
                yield {**who, "kind": place, "name": key, "step": None, "value": float(measure[place])}
    for entry in outcome["history"]:
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                yield {**who, "kind": "log", "name": name, "step": entry.get("step"), "value": float(value)}
    for name in ("wall_seconds", "cpu_seconds"):
        yield {**who, "kind": "process", "name": name, "step": None, "value": float(outcome[name])}


def surroundings(recipe: Path) -> dict[str, Any]:
    """What a run's numbers depend on beside its command: commit, versions, hardware."""
    return {
        "commit": commit(recipe.resolve().parent),
        "versions": installed_versions(),
        "hardware": describe_hardware(),
    }


def commit(folder: Path) -> str | None:
    """The commit of the recipe's repository, and whether files differ from it; None outside of one."""
    head = _git(folder, ["rev-parse", "HEAD"])
    if not head:
        return None
    return head + (" with uncommitted changes" if _git(folder, ["status", "--porcelain", "-uno"]) else "")


def _git(folder: Path, words: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
