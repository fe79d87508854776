"""The outcomes over which two models of different tokenizers are compared at one place: common tokens and the rest.

Shapes: V vocabulary, S tokens that both spell alike, R tokens of a block, K top-k.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from gkd.loss import eager


class Outcomes:
    """How one model's V tokens make S outcomes and the rest."""

    def __init__(self, ids: Tensor, joined: Tensor | None, vocab: int, dtype: torch.dtype, device: torch.device):
        self.ids, self.joined, self.vocab = ids, joined, vocab
        self.others = vocab - ids.numel() - (0 if joined is None else joined.shape[1])
        self.rest = torch.ones(vocab, dtype=dtype, device=device).index_fill_(0, ids, 0)
        if joined is not None:
            self.rest.index_fill_(0, joined[0], 0)
            self.several = torch.zeros_like(ids, dtype=torch.bool).index_fill_(0, joined[1], True)

    def common(self, model: eager.Distributions) -> Tensor:
        """Log-probabilities of the common tokens themselves [R, S]."""
        return model.log_p.index_select(1, self.ids)

    def _masses(self, p: Tensor) -> Tensor:
        masses = p.index_select(1, self.ids)
        if self.joined is not None:
            masses.index_add_(1, self.joined[1], p.index_select(1, self.joined[0]))
        return masses

    def take(self, model: eager.Distributions, common: Tensor, has_rest: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the compared outcomes [R, S + 1], or [R, S] where there is no rest; and e to them."""
        masses = self._masses(model.p)
        if self.joined is not None:
            common = torch.where(self.several, eager.log_of(masses), common)
        if not has_rest:
            within = common.log_softmax(dim=-1)
            return within, within.exp()
        of_rest = eager.log_of(model.p.mv(self.rest))[:, None]
        return torch.cat([common, of_rest], dim=1), torch.cat([masses, of_rest.exp()], dim=1)

    def spread_(self, out: Tensor, of_outcomes: Tensor, p: Tensor) -> Tensor:
        """Add [R, S] to the tokens of each outcome [R, V], in proportion to their probability."""
        if self.joined is None:
            return out.index_add_(1, self.ids, of_outcomes)
        by_mass = of_outcomes / self._masses(p).clamp_min(torch.finfo(p.dtype).tiny)
        own = torch.where(self.several, by_mass * p.index_select(1, self.ids), of_outcomes)
        joined = by_mass.index_select(1, self.joined[1]) * p.index_select(1, self.joined[0])
        return out.index_add_(1, self.ids, own).index_add_(1, self.joined[0], joined)

    @cached_property
    def _of_tokens(self) -> Tensor:
        """[V + 1] the outcome that each token counts with; S is the rest, also that of ids from V on."""
        found = torch.full((self.vocab + 1,), self.ids.numel(), dtype=torch.long, device=self.ids.device)
        found.index_copy_(0, self.ids, torch.arange(self.ids.numel(), device=self.ids.device))
        return found if self.joined is None else found.index_copy_(0, *self.joined)

    def of(self, tokens: Tensor) -> Tensor:
        """The number of the outcome that each of the tokens counts with, of the same shape; S is the rest."""
        return self._of_tokens.take(tokens.clamp_max(self.vocab))

    def common_of(self, tokens: Tensor) -> Tensor:
        """The same of tokens that are common themselves; S for all others."""
        found = self.of(tokens)
        own = torch.cat([self.ids, self.ids.new_full((1,), -1)]).take(found)
        return torch.where(own == tokens, found, self.ids.numel())

    def with_spares(self, model: eager.Distributions, common: Tensor, number: int) -> eager.Distributions:
        """The distribution over S outcomes, the rest, and `number` spare ones that hold nothing."""
        log_p, p = self.take(model, common, True)
        nothing = torch.zeros(p.shape[0], number, dtype=p.dtype, device=p.device)
        log_p, p = torch.cat([log_p, eager.log_of(nothing)], dim=1), torch.cat([p, nothing], dim=1)
        return eager.Distributions(log_p, p, p, model.entropy, model.chosen)

    def to_tokens(self, gradient: Tensor, outcomes: Tensor, p: Tensor, out: Tensor) -> Tensor:
        """A gradient [R, S + 1 + spares] with respect to the outcomes' logits as one of the tokens' [R, V], in `out`:
        a token has the share of its outcome's that it has of its probability."""
        size = self.ids.numel()
        of_rest = gradient[:, size : size + 1] / outcomes[:, size : size + 1].clamp_min(torch.finfo(p.dtype).tiny)
        torch.mul(of_rest, self.rest, out=out).mul_(p)
        return self.spread_(out, gradient[:, :size], p)


def most_likely_outcomes(
    outcome: Tensor, log_q: Tensor, log_tail: Tensor | None, size: int, tail: str | None
) -> tuple[eager.TopK, Tensor]:
    """The teacher's K most likely tokens as outcomes, each once: those of one outcome are put together, those of the
    rest count with the tail.

    Args:
        outcome: [R, K] what each token counts with, of `size`; `size` is the rest. log_q: [R, K].
        log_tail: [R, 1] of all other tokens; None where there are no others.
        tail: as `LossSettings.top_k_tail`; None compares both given one of the outcomes.

    Returns:
        K outcomes, of which those behind `size` are spare and hold nothing; and which rows have any [R].
    """
    outcome, order = outcome.sort(dim=1, stable=True)
    log_q = log_q.gather(1, order)
    q = log_q.exp()
    starts = torch.ones_like(outcome)
    starts[:, 1:] = (outcome[:, 1:] != outcome[:, :-1]).long()
    slot = starts.cumsum(dim=1) - 1
    number = torch.zeros_like(outcome).scatter_add_(1, slot, torch.ones_like(outcome))
    mass = torch.zeros_like(q).scatter_add_(1, slot, q)
    alone = torch.full_like(log_q, -torch.inf).scatter_reduce_(1, slot, log_q, "amax")
    log_mass = torch.where(number > 1, eager.log_of(mass), alone)
    ids = torch.full_like(outcome, size).scatter_(1, slot, outcome)
    spare = ids == size
    rest = (q * (outcome == size)).sum(dim=1, keepdim=True)  # the K tokens that nothing counts with
    log_rest = eager.log_of(rest if log_tail is None else rest + log_tail.exp())
    if log_tail is not None:
        log_rest = torch.where(rest > 0, log_rest, log_tail)
    ids = torch.where(spare, torch.arange(size + 1, size + 1 + ids.shape[1], device=ids.device), ids)
    log_mass = torch.where(spare, eager.log_of(torch.zeros_like(log_mass)), log_mass)
    return eager.with_tail(ids, log_mass, log_rest, tail or "renormalize_both"), ~spare.all(dim=1)
