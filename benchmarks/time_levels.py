"""When a training is down to a level: pure arithmetic on the curves of `time_to_quality.py`, for it and for the tables
of docs/evidence.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LEVELS = (0.8, 0.65, 0.55)  # of the divergence before training; all get there in 60 steps on the tuning seed
TUNING = 0  # the seed that the learning rate is chosen on; it is in no figure
OURS = "gkd"
Curve = Sequence[Sequence[float]]  # (step, CPU seconds, divergence)
Found = Mapping[str, tuple[float, list[Curve]]]  # by contender: its rate, a curve for each seed


def reached(curve: Curve, level: float) -> float:
    """CPU seconds until the divergence was down to a level for the first time; infinite if never."""
    return next((seconds for _, seconds, value in curve if value <= level), math.inf)


def best_rate(curves: Mapping[float, Curve], levels: Sequence[float]) -> float:
    """The rate that is first at the lowest level that any of them reached, or else ends lowest."""
    for level in reversed(levels):
        times = {rate: reached(curve, level) for rate, curve in curves.items()}
        if min(times.values()) < math.inf:
            return min(times, key=lambda rate: times[rate])
    return min(curves, key=lambda rate: curves[rate][-1][2])


def found_in(kept: Mapping[str, Any]) -> Found:
    """Of what the script wrote: each contender's best rate on the tuning's seed, and the curves of the other seeds."""
    runs = kept["runs"]
    found: dict[str, tuple[float, list[Curve]]] = {}
    for name in dict.fromkeys(run["contender"] for run in runs):
        own = [run for run in runs if run["contender"] == name]
        tuned = {run["rate"]: run["curve"] for run in own if run["seed"] == TUNING}
        rate = best_rate(tuned, kept["levels"]) if tuned else own[0]["rate"]  # one alone needs no choice
        others = [run for run in own if run["seed"] != TUNING and run["rate"] == rate]
        found[name] = (rate, [run["curve"] for run in sorted(others, key=lambda run: run["seed"])])
    return found


def rows(levels: Sequence[float], found: Found) -> list[list[str]]:
    """A line for each contender: seconds to each level, mean ± s.e. over the seeds, and in brackets the share of what
    the fastest peer takes; or how many seeds got there."""
    peers = [[_times(found[name][1], level) for name in found if not name.startswith(OURS)] for level in levels]
    lines = []
    for name, (rate, curves) in found.items():
        cells = []
        for level, of_peers in zip(levels, peers, strict=True):
            times = _times(curves, level)
            fastest = min((statistics.mean(one) for one in of_peers), default=math.inf)
            cells.append(_cell(times, fastest))
        lines.append([name, f"{rate:g}", *cells])
    return lines


def _times(curves: Sequence[Curve], level: float) -> list[float]:
    return [reached(curve, level) for curve in curves]


def _cell(times: Sequence[float], fastest: float) -> str:
    there = [one for one in times if one < math.inf]
    if len(there) < len(times) or not times:
        return f"{len(there)} of {len(times)} got there"
    mean = statistics.mean(there)
    error = f" ± {statistics.stdev(there) / len(there) ** 0.5:.1f}" if len(there) > 1 else ""
    share = f" ({mean / fastest:.2f})" if fastest < math.inf else ""
    return f"{mean:.1f}{error}{share}"
