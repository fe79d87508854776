"""Where each sequence of an optimizer step comes from: the data set, the student, or the teacher.

Agarwal et al. (arXiv 2306.13649), Algorithm 1, toss one coin u ~ U(0, 1) per step and use student-written sequences
for the whole step when u <= lambda; that is `mixing="batch"`. The default, `mixing="sample"`, has the same
expectation and no step-to-step variance: in every step exactly the share lambda of the sequences is student-written.

The decision is a pure function of (seed, step, row), so it is the same on every rank without communication, the same
after a resume, and independent of whatever else draws random numbers.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from gkd.common.ranges import one_of, within

SOURCES = ("data", "student", "teacher")
MIXINGS = ("sample", "batch")


@dataclass(frozen=True)
class Mixture:
    """Which share of the rows the student writes, and how that share is drawn; see `choose_sources`.

    Raises:
        ValueError: `lmbda` is no share, or `mixing` is unknown.
    """

    lmbda: float
    seq_kd: bool = False
    mixing: str = "sample"

    def __post_init__(self) -> None:
        within("lmbda", self.lmbda, 0, 1, "0 trains on the data only, 1 on rollouts only")
        one_of("mixing", self.mixing, MIXINGS)

    @property
    def other(self) -> str:
        """Where the rows come from that the student does not write."""
        return "teacher" if self.seq_kd else "data"


def choose_sources(
    seed: int, step: int, num_rows: int, lmbda: float, seq_kd: bool = False, mixing: str = "sample"
) -> list[str]:
    """Choose the source of every row of one optimizer step.

    Args:
        seed: the run's seed.
        step: number of the optimizer step, from 0.
        num_rows: rows in the step, over all micro-batches and all ranks.
        lmbda: share of the rows whose completion the student writes; 0 and 1 are exact.
        seq_kd: rows not written by the student are written by the teacher instead of taken from the data.
        mixing: `"sample"` (exactly `lmbda * num_rows` rows, rounded by a seeded draw so that the expectation is
            exact) or `"batch"` (one coin for the whole step).

    Returns:
        One of `"data"`, `"student"`, `"teacher"` for each row, in the order of the rows in the data stream.

    Raises:
        ValueError: `lmbda` outside [0, 1], unknown `mixing`, or a negative `num_rows`.
    """
    other = Mixture(lmbda, seq_kd, mixing).other
    if num_rows < 0:
        raise ValueError(f"num_rows={num_rows} is negative")
    # A string seed goes through SHA-512: neighbouring (seed, step) pairs give unrelated draws on every platform.
    rng = random.Random(f"gkd source {seed} {step}")
    if mixing == "batch":
        return ["student" if rng.random() < lmbda else other] * num_rows
    quota = round(lmbda * num_rows, 9)  # 0.07 * 100 is 7.000000000000001; the share is meant to be 7
    num_student = math.floor(quota)
    num_student += rng.random() < quota - num_student
    chosen = set(rng.sample(range(num_rows), num_student))
    return ["student" if row in chosen else other for row in range(num_rows)]
