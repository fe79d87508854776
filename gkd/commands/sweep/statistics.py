"""Mean, standard error, paired difference, interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gkd.evaluation.measures import mean_estimate

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the last one is a little too wide.
_T: tuple[float, ...]
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class Stat:
    """A mean over `count` seeds and its standard error, None where one seed gives none."""

    mean: float
    error: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval by Student's t."""
        return None if self.error is None else _T[min(self.count - 1, len(_T)) - 1] * self.error


def mean_of(values: Sequence[float]) -> Stat | None:
    """None when there are no values, or one is not finite."""
    if not values or not all(math.isfinite(value) for value in values):
        return None
    found = mean_estimate(values)
    return Stat(found.value, found.error, found.count)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Stat | None:
    """Of the differences to the base, seed by seed, over the seeds that both have: what a seed does to both cells
    alike is no noise."""
    return mean_of([values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())])
