"""Whether a server samples from the weights that are trained, and as it was asked to: looked at in every step.

Names and stamps say which adapter a server *says* it used. What it did use shows in the log-probabilities that it
gives with the tokens it sampled: they must be the student's own, which the training's forward pass has at hand. Two
numbers, in nats per token, over the tokens of a step on all ranks:

- **gap**, mean |log p_server - log p_student| of the sampled tokens. Weights that are old or other ones lift it: it
  grows like the square root of twice their KL. Reduced precision gives 0.01 to 0.05, fp32 about 1e-5. A server started
  with `--logprobs-mode processed_logprobs` gives the log-probabilities of what it samples from, at the sampling's
  temperature and cut: those count as well, whichever of the two is nearer.
- **surprise**, mean of E[log p] - log p of the sampled tokens, E over the distribution that was to be sampled from:
  0 on average when it was, above 0 when the server sampled at a higher temperature, below 0 at a lower one. Its
  standard error is known (the terms of a sequence are martingale differences), so chance raises no alarm.

Shapes: N targets, n of them looked at, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from gkd.common.ranks import sum_over_ranks
from gkd.loss.signals import Head
from gkd.rollouts.base import SamplingSettings
from gkd.servers.client import ServerError

logger = logging.getLogger(__name__)

_MOST = 128  # targets of a micro-batch that are looked at, evenly spread: their logits are computed once more
_VOCABULARY = 8192  # rows of the head that are made fp32 at a time
_ROWS = 32  # of them at a time, so that a few [rows, V] buffers are all that it takes
_ERRORS = 5.0  # standard errors of the surprise that are chance
_GROWN = 5.0  # a gap that is so many times the smallest of the run ...
_NOISE = 0.02  # ... and above this is worth a warning


@dataclass(frozen=True)
class Compared:
    """What a step showed. `error`: standard error of the surprise."""

    tokens: int
    gap: float
    surprise: float
    error: float


class RolloutCheck:
    """Collects a step's comparison on this rank; `close` meets the other ranks and judges.

    Args:
        settings: how the server was asked to sample.
        tolerance: in nats per token, of both numbers; twice that where the sampling weights are a step old.
        accelerator: to add up over ranks. field: the servers' field, for messages.
    """

    def __init__(self, settings: SamplingSettings, tolerance: float, accelerator: Accelerator, field: str) -> None:
        self.settings, self.tolerance, self.accelerator, self.field = settings, tolerance, accelerator, field
        self._left, self._age, self._smallest = 0, 0, math.inf
        self._warned = False
        self._sums = torch.zeros(5, dtype=torch.float64)

    def open(self, micro_batches: int, age: int) -> None:
        """A step begins that the student's rollouts are part of, on this rank or another."""
        self._left, self._age, self._sums = micro_batches, age, torch.zeros(5, dtype=torch.float64)

    @torch.no_grad()
    def add(self, hidden: Tensor, head: Head, targets: Tensor, said: Tensor) -> None:
        """A micro-batch: hidden states [N, D], the head (whole), targets [N], and what the server said [N] of its own
        tokens, NaN of all others."""
        mine = (~said.isnan()).nonzero()[:, 0]
        mine = mine[:: max(1, math.ceil(len(mine) / _MOST))]
        if len(mine) == 0:
            return
        parts = zip(mine.split(_ROWS), _logits(hidden.detach()[mine], head).split(_ROWS), strict=True)
        sums = torch.stack([self._compare(logits, targets[rows], said[rows]) for rows, logits in parts])
        self._sums += sums.cpu().double().sum(dim=0)  # one transfer a micro-batch

    def _compare(self, logits: Tensor, targets: Tensor, said: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=-1)
        own = log_p.gather(1, targets[:, None])[:, 0]
        sampled = _sampling_log_probs(logits, self.settings)
        q = sampled.exp()
        mean = (q * log_p).sum(dim=-1)
        variance = (q * (log_p - mean[:, None]).square()).sum(dim=-1)
        processed = sampled.gather(1, targets[:, None])[:, 0].clamp_min(torch.finfo(torch.float32).min)
        gaps = (said - own).abs(), (said - processed).abs()
        return torch.stack([torch.ones_like(own), *gaps, mean - own, variance]).sum(dim=1)

    def close(self) -> Compared | None:
        """After each micro-batch of a training step; what the step showed after its last one, on every rank alike.

        Raises:
            ServerError: the sampled tokens cannot be the student's. All ranks raise it, before the weights move.
        """
        if self._left == 0:
            return None
        self._left -= 1
        if self._left > 0:
            return None
        count, gap, processed, surprise, variance = sum_over_ranks(self.accelerator, self._sums).tolist()
        found = min(gap, processed) / max(count, 1), surprise / max(count, 1)
        if count == 0 or not all(map(math.isfinite, found)):  # a student that gives NaN is another guard's matter
            return None
        compared = Compared(int(count), *found, math.sqrt(max(variance, 0.0)) / count)
        self._judge(compared)
        return compared

    def _follows_rules(self) -> bool:
        """Rules that depend on what was sampled before are not followed here."""
        return self.settings.repetition_penalty == 1 and not self.settings.extra.get("min_new_tokens")

    def _judge(self, compared: Compared) -> None:
        limit = self.tolerance * (1 + self._age)
        wrong = None
        if compared.gap > limit:
            wrong = (
                f"its log-probabilities of the {compared.tokens} tokens compared are {compared.gap:.3f} nats from the "
                f"student's own on average, where {limit:g} is tolerated: it samples from other weights (an adapter "
                "of an earlier step, the base model alone, another precision)"
            )
        elif self._follows_rules() and abs(compared.surprise) > limit + _ERRORS * compared.error:
            how = "less likely" if compared.surprise > 0 else "more likely"
            wrong = (
                f"the {compared.tokens} tokens compared are {abs(compared.surprise):.3f} nats {how} than sampling at "
                f"temperature={self.settings.temperature} makes them on average: it does not sample as it is asked to"
            )
        if wrong is not None:
            error = ServerError(
                f"{self.field}: the server does not sample from the student: {wrong}. Start the server anew and go on "
                "from the checkpoint; where the difference is known and wanted, raise rollout_logprob_tolerance "
                f"(now {self.tolerance:g}; 0 compares nothing)"
            )
            error.on_all_ranks = True
            raise error
        if compared.gap > max(_NOISE, _GROWN * self._smallest) and not self._warned:
            self._warned = True
            logger.warning(
                "%s: the server's log-probabilities are %.3f nats from the student's own, and were %.4f: does it "
                "still get every step's adapter? (rollout/logprob_gap; an error above %g)",
                self.field,
                compared.gap,
                self._smallest,
                limit,
            )
        self._smallest = min(self._smallest, compared.gap)


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """[n, V] in fp32 whatever the head's dtype, a part of the vocabulary at a time: bf16 would round a logit of 20 to
    multiples of an eighth, which is the size of what is looked for."""
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.float()
        parts = [torch.mm(hidden, rows.float().t()) for rows in head.weight.detach().split(_VOCABULARY)]
        out = torch.cat(parts, dim=1)
        if head.bias is not None:
            out += head.bias.detach().float()
        out *= head.logit_scale
        return out if head.softcap is None else torch.tanh(out / head.softcap) * head.softcap


def _sampling_log_probs(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """log-probabilities [n, V] of what is sampled from: the temperature, then min_p, top_k and top_p (vLLM's order);
    -inf for what is never sampled."""
    suppressed = list(settings.extra.get("suppress_tokens") or ())
    if suppressed:
        logits = logits.clone()
        logits[:, suppressed] = -math.inf
    if settings.temperature == 0:
        chosen = torch.full_like(logits, -math.inf)
        return chosen.scatter_(1, logits.argmax(dim=-1, keepdim=True), 0.0)
    log_q = (logits / settings.temperature).log_softmax(dim=-1)
    if settings.min_p:
        log_q = log_q.masked_fill(log_q < log_q.amax(dim=-1, keepdim=True) + math.log(settings.min_p), -math.inf)
    if 0 < settings.top_k < log_q.shape[1]:
        log_q = log_q.masked_fill(log_q < log_q.topk(settings.top_k, dim=-1).values[:, -1:], -math.inf)
    if settings.top_p < 1:
        ordered, order = log_q.log_softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()
        cut = torch.zeros_like(log_q, dtype=torch.bool).scatter(1, order, before >= settings.top_p)
        log_q = log_q.masked_fill(cut, -math.inf)
    return log_q.log_softmax(dim=-1)
