"""The student as a draft model for the teacher: how much of what it proposes is taken, and what that gains.

Speculative decoding (Leviathan, Kalman and Matias, arXiv 2211.17192): the draft writes gamma tokens, the target checks
them in one pass, takes each with probability min(1, p / q) up to the first that it does not take, and adds one of its
own. What comes out is distributed as the target's own text. So the contexts are those of the target's text, and at
each a proposed token is taken with probability sum_v min(p, q) = 1 - TV(p, q) (their Theorem 3.5), or greedily where
both have the same likeliest token. With a the mean of that, a pass gives

    1 + a + ... + a^gamma = (1 - a^(gamma + 1)) / (1 - a)

tokens (their Eq. 1), if every token is taken with the same chance, independently of the others. Their Theorem 3.8 for
the speed-up counts a checking pass as one step of the target; here what it costs is measured, since on a CPU, or with
many rows at a time, gamma + 1 tokens cost more than one.

N targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gkd.data.sequences import TokenSequence
from gkd.evaluation.measures import Estimate, ratio_estimate
from gkd.evaluation.subject import Conditions, Signal, Subject
from gkd.loss.divergences import total_variation
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal

MOST_TOKENS = 16  # that a better block is looked for in


@dataclass(frozen=True)
class Costs:
    """Seconds of one decoding step: a token of the draft, a token of the target, a block that the target checks."""

    draft: float
    target: float
    check: float
    tokens: int

    def speedup(self, block: float, tokens: int | None = None) -> float:
        """Of decoding in blocks of drafted `tokens` that give `block` tokens each, over the target alone. What a block
        of another size costs to check is interpolated."""
        number = self.tokens if tokens is None else tokens
        check = self.target + (self.check - self.target) * number / self.tokens
        return block * self.target / (number * self.draft + check)

    def in_words(self) -> str:
        """What checking a block costs."""
        return f"{self.check / self.target:.2f} of one token"

    def best(self, acceptance: float) -> tuple[int, float]:
        """The number of drafted tokens that gains most, and what it gains."""
        gains = {n: self.speedup(block_efficiency(acceptance, n), n) for n in range(1, MOST_TOKENS + 1)}
        tokens = max(gains, key=lambda n: gains[n])
        return tokens, gains[tokens]


def block_efficiency(acceptance: float, tokens: int) -> float:
    """Tokens of a block: 1 + a + ... + a^tokens."""
    return sum(acceptance**i for i in range(tokens + 1))


def as_draft(
    model: Subject,
    teacher: Subject,
    texts: Mapping[str, Sequence[TokenSequence]],
    costs: Costs | None,
    *,
    tokens: int,
    temperature: float,
    loss: LossSettings,
    exchanged: tuple[int, int] | None,
    how: Conditions,
    tick: Callable[[int], None],
) -> dict[str, Estimate]:
    """Acceptance, tokens a block and predicted speed-up, by key of METRICS.

    Args:
        model: the draft. teacher: the target.
        texts: what the target writes by itself: "" sampled at `temperature`, "_greedy" greedily.
        costs: of these two; None where they cannot be measured, and no speed-up is told.
        tokens: gamma.
        loss: temperatures and divergence do not count, what is compared does.
        exchanged: as `EndMap`.
        how, tick: as in `Subject.compared`.
    """
    found: dict[str, Estimate] = {}
    for way, rows in texts.items():
        compare = partial(_taken, loss=loss, temperature=0.0 if way else temperature, exchanged=exchanged)
        values = model.compared(teacher, rows, compare, how, tick)
        assert values is not None, "a draft is no target"
        chance = ratio_estimate([float(v.sum()) for v in values], [row.num_targets for row in rows])
        found[f"acceptance{way}"] = chance
        slope = sum(i * chance.value ** (i - 1) for i in range(1, tokens + 1))
        block = _scaled(chance, block_efficiency(chance.value, tokens), slope)
        found[f"block_efficiency{way}"] = block
        if costs is not None:
            gain = costs.speedup(1.0)
            found[f"speedup{way}"] = _scaled(block, block.value * gain, gain)
    if costs is not None:
        found["draft_cost"] = Estimate(costs.draft / costs.target, None, 1)
    return found


def _scaled(of: Estimate, value: float, slope: float) -> Estimate:
    """A function of an estimate, by the delta method."""
    error = None if of.error is None else abs(slope) * of.error
    return Estimate(value, error, of.count, tuple(slope * one for one in of.residuals))


def _taken(
    own: DenseSignal,
    signal: Signal,
    targets: Tensor,
    *,
    loss: LossSettings,
    temperature: float,
    exchanged: tuple[int, int] | None,
) -> Tensor:
    """The chance [N] that a token of the student's is taken where the teacher wrote these targets, on the CPU."""
    if exchanged is not None:
        signal = signal.exchanging(exchanged)
    plain = replace(
        loss,
        divergence=total_variation(),
        loss_temperature=temperature or 1.0,
        teacher_loss_temperature=None,
        scale_by_temperature_squared=False,
        report_kls=False,
    )
    no_loss = torch.zeros(len(targets), device=own.hidden.device)
    output = fused_divergence(own.hidden, own.head, signal, targets, no_loss, plain)
    if temperature == 0:
        assert output.agreement is not None
        return output.agreement.cpu().double()
    assert output.divergence is not None
    return 1 - output.divergence.cpu().double()
