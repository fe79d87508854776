"""The time to quality: from curves to the table, by hand."""

import math
import runpy
from pathlib import Path

LEVELS = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "time_levels.py"))


def run(contender, rate, seed, *times):
    """A curve that is at 0.9, 0.7 and 0.4 after these seconds."""
    values = [
        [step, seconds, value] for step, (seconds, value) in enumerate(zip(times, (0.9, 0.7, 0.4), strict=False))
    ]
    return {"contender": contender, "rate": rate, "seed": seed, "curve": values}


def test_the_rate_is_the_tunings_and_the_figures_are_of_the_other_seeds():
    runs = [
        run("gkd", 0.1, 0, 1.0, 2.0, 9.0),
        run("gkd", 0.2, 0, 1.0, 3.0, 8.0),  # later at 0.7, first at 0.4
        run("gkd", 0.1, 1, 50.0, 60.0, 70.0),
        run("gkd", 0.2, 1, 1.0, 2.0, 4.0),
        run("gkd", 0.2, 2, 1.0, 4.0, 6.0),
        run("peer", 0.1, 0, 5.0, 7.0),
        run("peer", 0.1, 1, 5.0, 6.0),
        run("peer", 0.1, 2, 5.0, 6.0, 40.0),
        run("other peer", 0.1, 0, 1.0),
        run("other peer", 0.1, 1, 1.0),
        run("other peer", 0.1, 2, 1.0),
    ]
    found = LEVELS["found_in"]({"levels": [0.9, 0.7, 0.4], "runs": runs})
    assert [rate for rate, _ in found.values()] == [0.2, 0.1, 0.1]
    assert LEVELS["rows"]([0.9, 0.7, 0.4], found) == [
        ["gkd", "0.2", "1.0 ± 0.0 (1.00)", "3.0 ± 1.0 (0.50)", "5.0 ± 1.0"],  # nobody else is always at 0.4
        ["peer", "0.1", "5.0 ± 0.0 (5.00)", "6.0 ± 0.0 (1.00)", "1 of 2 got there"],
        ["other peer", "0.1", "1.0 ± 0.0 (1.00)", "0 of 2 got there", "0 of 2 got there"],
    ]


def test_one_rate_alone_needs_no_tuning():
    runs = [run("gkd", 0.2, 1, 1.0, 2.0, 4.0), run("gkd", 0.2, 2, 1.0, 4.0, 6.0)]
    found = LEVELS["found_in"]({"levels": [0.4], "runs": runs})
    assert found == {"gkd": (0.2, [one["curve"] for one in runs])}


def test_a_level_is_reached_at_the_first_place_that_is_not_above_it():
    curve = [[5, 1.0, 0.8], [10, 2.0, 0.5], [15, 3.0, 0.6]]
    assert LEVELS["reached"](curve, 0.8) == 1.0
    assert LEVELS["reached"](curve, 0.55) == 2.0
    assert LEVELS["reached"](curve, 0.4) == math.inf
