"""Walks that the teacher does not prefer: distillation with a reward for what it does half of the time.

    python studies/grid_walk/models.py                                    # teacher and students, once
    python studies/reward/recipe.py --lmbda 1 --reward_weight 0.1

The task of studies/grid_walk. A walk that arrives counts 1 when its first move is to the left or to the right, and 0
when it is up or down; only tasks that ask for both kinds of moves are taken. The teacher makes either with one half.
"""

import sys
from pathlib import Path
from typing import Any

from gkd.run import Settings, run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "grid_walk"))
from recipe import DEFAULTS, load_data  # studies/grid_walk/recipe.py
from walk import Task, arrives

OWN: dict[str, Any] = {**DEFAULTS, "lmbda": 1.0, "beta": 1.0, "output_dir": "outputs/reward"}


def asks_for_both(row: dict[str, Any]) -> bool:
    """Whether goal and start differ in both directions."""
    task = Task.read(row["prompt"])
    return task.start[0] != task.goal[0] and task.start[1] != task.goal[1]


def rows(settings: Settings) -> dict[str, Any]:
    """Those of the grid walk that leave a choice."""
    return {name: part.filter(asks_for_both) for name, part in load_data(settings).items()}


def score(completion: str, row: dict[str, Any]) -> float:
    """1 when it arrives and began with a move to the side."""
    return float(completion[:1] in ("L", "R") and arrives(row["prompt"], completion))


if __name__ == "__main__":
    run(rows, defaults=OWN, score=score, description=__doc__.splitlines()[0])
