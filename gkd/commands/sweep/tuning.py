"""A cell's best value of a field, chosen on a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gkd.commands.sweep.outcome import Outcome

# What decides, the first that was measured: none of them knows which loss was trained with.
DECIDES = ("score_greedy", "score_sampled", "divergence_own", "perplexity")
SEED_BEFORE = 1  # the tuning's seed is the first one's less this, or the one behind all that may come


def tuning_seed(first: int) -> int:
    """A seed that no run of the table has."""
    return first - SEED_BEFORE if first >= SEED_BEFORE else 2**31 - 1


def best(outcomes: Sequence[Outcome]) -> tuple[Outcome, str] | None:
    """The outcome with the best measure, and which one decided: the first of DECIDES that every outcome has; None when
    there is none. Equal ones: the first."""
    for name in DECIDES:
        found = [outcome["measures"].get(name, {}) for outcome in outcomes]
        values = [one.get("after") for one in found]
        if values and all(value is not None and math.isfinite(value) for value in values):
            sign = -1 if found[0]["goal"] == "higher" else 1
            order = sorted(range(len(values)), key=lambda i: sign * values[i])
            return outcomes[order[0]], name
    return None
