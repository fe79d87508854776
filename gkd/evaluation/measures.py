"""What an evaluation found of one model: numbers with standard errors. No model and no torch in here.

Standard errors are over *sequences*, the things that were drawn at random, not over tokens, which hang together
within a sequence: a token mean is a ratio of two sums over sequences, and its error comes from the linearised
residuals of that ratio.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A measured number. `error` is its standard error over `count` sequences, None where there is none to give.

    `residuals` holds the shares of the error, for paired comparisons: one for each sequence in the order of the
    prompts, or one for each resampled set.
    """

    value: float
    error: float | None = None
    count: int = 0
    residuals: tuple[float, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, which has no NaN: None stands for it."""
        return {"value": finite(self.value), "error": finite(self.error), "count": self.count}


@dataclass(frozen=True)
class Metric:
    """One measure. `goal`: `"lower"`, `"higher"`, or `"teacher"` (the nearer the teacher's value the better)."""

    key: str
    label: str
    unit: str
    goal: str


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("divergence_own", "Divergence, own completions", "nats/token", "lower"),
        Metric("divergence_teacher_text", "Divergence, teacher's completions", "nats/token", "lower"),
        Metric("exposure_gap", "Exposure gap (own − teacher's)", "nats/token", "teacher"),
        Metric("forward_kl_own", "Forward KL at T = 1, own completions", "nats/token", "lower"),
        Metric("forward_kl_teacher_text", "Forward KL at T = 1, teacher's completions", "nats/token", "lower"),
        Metric("agreement_own", "Top-1 agreement, own completions", "share", "higher"),
        Metric("agreement_teacher_text", "Top-1 agreement, teacher's completions", "share", "higher"),
        Metric("perplexity", "Perplexity, held-out text", "", "lower"),
        Metric("bits_per_byte", "Bits per byte, held-out text", "", "lower"),
        Metric("bits_per_byte_teacher_text", "Bits per byte, teacher's completions", "", "lower"),
        Metric("acceptance", "Taken as a draft, sampled", "share", "higher"),
        Metric("acceptance_greedy", "Taken as a draft, greedy", "share", "higher"),
        Metric("block_efficiency", "Tokens a checking pass, sampled", "", "higher"),
        Metric("block_efficiency_greedy", "Tokens a checking pass, greedy", "", "higher"),
        Metric("draft_cost", "Cost of a drafted token, of the teacher's", "", "lower"),
        Metric("speedup", "Predicted speed-up, sampled", "", "higher"),
        Metric("speedup_greedy", "Predicted speed-up, greedy", "", "higher"),
        Metric("ended", "Completions that end by themselves", "share", "teacher"),
        Metric("length", "Completion length", "tokens", "teacher"),
        Metric("repeated_4grams", "Repeated 4-grams", "share", "teacher"),
        Metric("distinct_2", "Distinct 2-grams", "share", "teacher"),
        Metric("score_greedy", "Task score, greedy", "", "higher"),
        Metric("score_sampled", "Task score, sampled at T = 1", "", "higher"),
        Metric("corpus_score_greedy", "Corpus score, greedy", "", "higher"),
        Metric("corpus_score_sampled", "Corpus score, sampled at T = 1", "", "higher"),
    )
}


@dataclass(frozen=True)
class Measures:
    """Everything measured of one model. `values` is keyed as METRICS, or as `extra` for measures that are not among
    them; `samples` are (prompt, completion) texts, and `questions` what a table shows of these prompts."""

    name: str
    values: dict[str, Estimate]
    samples: tuple[tuple[str, str], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Metric] = field(default_factory=dict)
    questions: tuple[str, ...] = ()

    def as_log(self, prefix: str) -> dict[str, float]:
        """`{prefix/key: value}` with the finite values only, for the trainer's loggers."""
        return {f"{prefix}/{key}": est.value for key, est in self.values.items() if math.isfinite(est.value)}


# --------------------------------------------------------------------------------------------------- estimates


def ratio_estimate(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    """`sum(sums) / sum(counts)`, for example the mean over tokens, with its standard error over sequences.

    Args:
        sums: per sequence, the sum over its tokens.
        counts: per sequence, how many tokens (or 1 each for a plain mean over sequences).
    """
    assert len(sums) == len(counts), (len(sums), len(counts))
    total, n = math.fsum(counts), len(sums)
    if total == 0:
        return Estimate(math.nan, None, n)
    value = math.fsum(sums) / total
    residuals = tuple((s - value * c) / total for s, c in zip(sums, counts, strict=True))
    return Estimate(value, _error(residuals), n, residuals)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of one number per sequence, with its standard error."""
    return ratio_estimate(values, [1.0] * len(values))


def difference_estimate(a: Estimate, b: Estimate) -> Estimate:
    """`a - b` of two estimates over the same sequences in the same order, with the paired standard error."""
    if len(a.residuals) != len(b.residuals) or not a.residuals:
        return Estimate(a.value - b.value, None, min(a.count, b.count))
    residuals = tuple(x - y for x, y in zip(a.residuals, b.residuals, strict=True))
    return Estimate(a.value - b.value, _error(residuals), a.count, residuals)


def exponential_estimate(a: Estimate) -> Estimate:
    """`exp(a)`: a perplexity from a mean in nats; the error by the delta method."""
    value = math.exp(a.value) if a.value < 700 else math.inf
    error = None if a.error is None else value * a.error
    return Estimate(value, error, a.count, tuple(value * r for r in a.residuals))


def bootstrap_estimate(
    statistic: Callable[[Sequence[int]], float], count: int, resamples: int, draw: random.Random
) -> Estimate:
    """A number that belongs to a whole set of sequences, with its bootstrap standard error (Efron 1979).

    Args:
        statistic: numbers of sequences, repeated ones too -> the number.
        count: of sequences.
        resamples: sets drawn with replacement.
        draw: their random numbers; two models with the same ones are compared set by set.
    """
    value = statistic(range(count))
    if count < 2:
        return Estimate(value, None, count)
    drawn = [statistic([draw.randrange(count) for _ in range(count)]) for _ in range(resamples)]
    mean = math.fsum(drawn) / resamples
    residuals = tuple((one - mean) / math.sqrt(resamples) for one in drawn)
    return Estimate(value, _error(residuals), count, residuals)


def _error(residuals: Sequence[float]) -> float | None:
    """Standard error from the linearised residuals (which sum to 0): sqrt(n / (n - 1) * sum of squares)."""
    n = len(residuals)
    return None if n < 2 else math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals))


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ------------------------------------------------------------------------------------------- text statistics


def distinct_ngrams(completions: Iterable[Sequence[int]], n: int = 2) -> float:
    """Different n-grams / all n-grams over the whole set (distinct-n of Li et al. 2016, there per token).

    It falls with the size of the set, so it compares models on one set of prompts and nothing else.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
