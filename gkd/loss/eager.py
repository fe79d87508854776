"""The arithmetic of a few tokens' logits: softmax in place, statistics, the divergence and its gradient.

Shapes: R tokens of a block, V vocabulary, K top-k. Everything in fp32 (fp64 for fp64 inputs).

On a CPU this is a matter of memory traffic, not of arithmetic: blocks of a few tokens stay in the cache, every step
writes into a buffer that is already there, and no step is done twice. Together they cost about a tenth of the matrix
products around them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd.loss.divergences import forward_kl, reverse_kl
from gkd.loss.integrand import Divergence

# TopKSignal log-probabilities are fp32: their sum is known to about one rounding of 1, and so is the tail's mass.
_SMALLEST_TAIL = 2.0**-24


@dataclass(frozen=True, eq=False)
class Distributions:
    """One model's distributions over a block: at the loss temperature, and statistics at temperature 1.

    Attributes:
        log_p: [R, V] at the loss temperature. p: e^log_p.
        p_at_one: [R, V] probabilities at temperature 1 (p itself when that is the loss temperature).
        entropy: [R] nats, at temperature 1. chosen: [R] log-probability of the target at temperature 1.
    """

    log_p: Tensor
    p: Tensor
    p_at_one: Tensor
    entropy: Tensor
    chosen: Tensor


def shift_(z: Tensor) -> Tensor:
    """Subtract each token's maximum, in place: the largest logit becomes exactly 0."""
    return z.sub_(z.amax(dim=-1, keepdim=True))


def log_softmax_(z: Tensor, p: Tensor) -> None:
    """z (shifted logits) becomes its log-softmax, p its exponential.

    p comes from the rounded log-probabilities, not from a division: phi then sees a p and a log p that agree to the
    last digit, and divergences of nearly equal models stay non-negative.
    """
    torch.exp(z, out=p)
    z.sub_(p.sum(dim=-1, keepdim=True).log_())
    torch.exp(z, out=p)


def distributions(z: Tensor, targets: Tensor, temperature: float, p: Tensor, scratch: Tensor) -> Distributions:
    """Distributions of shifted logits z [R, V], which become log-probabilities in place; p and scratch are buffers."""
    if temperature == 1:
        log_softmax_(z, p)
        return Distributions(z, p, p, _entropy(z, p, scratch), z.gather(1, targets[:, None])[:, 0])
    log_at_one, p_at_one = z.clone(), torch.empty_like(z)
    log_softmax_(log_at_one, p_at_one)
    entropy, chosen = _entropy(log_at_one, p_at_one, scratch), log_at_one.gather(1, targets[:, None])[:, 0]
    log_softmax_(z.div_(temperature), p)
    return Distributions(z, p, p_at_one, entropy, chosen)


def _entropy(log_p: Tensor, p: Tensor, scratch: Tensor) -> Tensor:
    return torch.mul(log_p, p, out=scratch).sum(dim=-1).neg_()


def same_top(student: Tensor, teacher: Tensor, scratch: Tensor) -> Tensor:
    """1.0 where both models' shifted logits have the same most likely token [R]: the only place where both are 0."""
    return torch.add(student, teacher, out=scratch).amax(dim=-1).eq(0).to(student.dtype)


def both_kls(a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL(teacher || student) and reverse KL(student || teacher) by token; the arguments are left alone."""
    forward, _ = forward_kl().value_and_slope(a.clone(), b.clone(), p, q.clone())
    reverse, _ = reverse_kl().value_and_slope(a.clone(), b.clone(), p, q.clone())
    return forward, reverse


def softmax_gradient_(slope: Tensor, p: Tensor) -> Tensor:
    """phi_a [R, V] becomes dD/d(z / T) = phi_a - p sum(phi_a), in place."""
    return slope.addcmul_(p, slope.sum(dim=-1, keepdim=True), value=-1)


# --- top-k teachers ----------------------------------------


@dataclass(frozen=True, eq=False)
class TopK:
    """The teacher's K most likely outcomes and the rest: ids and log_q [R, K], log_tail [R, 1] or None (no rest).

    `tail` says what becomes of the rest, see `LossSettings.top_k_tail`; "bucket" where there is none.
    """

    ids: Tensor
    log_q: Tensor
    log_tail: Tensor | None
    tail: str = "bucket"


def top_k_of_dense(log_q: Tensor, q: Tensor, k: int, tail: str) -> TopK:
    """The top k of a teacher whose full distribution is at hand (k < V); q is used up."""
    top, ids = log_q.topk(k, dim=-1)
    rest = q.scatter_(1, ids, 0).sum(dim=-1, keepdim=True)  # added up, not 1 - sum: exact however small
    return with_tail(ids, top, log_of(rest), tail)


def top_k_of_signal(ids: Tensor, log_q: Tensor, vocab: int, tail: str) -> TopK:
    """The same from log-probabilities alone; the tail's mass is what they leave, by log1mexp."""
    if ids.shape[-1] >= vocab:
        return TopK(ids, log_q, None)
    return with_tail(ids, log_q, log_mass_left(log_q), tail)


def log_mass_left(log_q: Tensor) -> Tensor:
    """What log-probabilities [R, K] of a signal leave to all other tokens [R, 1]."""
    return log1mexp(log_q.logsumexp(dim=-1, keepdim=True).clamp_max(-_SMALLEST_TAIL))


def with_tail(ids: Tensor, log_q: Tensor, log_tail: Tensor, tail: str) -> TopK:
    """Outcomes ids, log_q [R, K] and the mass of all others [R, 1], of which becomes what `tail` says."""
    if tail == "bucket":
        return TopK(ids, log_q, log_tail)
    if tail == "ignore":
        return TopK(ids, log_q, None, tail)
    within = log_q - log_q.logsumexp(dim=-1, keepdim=True)
    if tail == "renormalize_both":
        return TopK(ids, within, None, tail)
    assert tail == "renormalize"
    return TopK(ids, within, log_of(torch.zeros_like(log_tail)), tail)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends (Maechler 2012)."""
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_of(mass: Tensor) -> Tensor:
    """log, of nothing that of the smallest number."""
    return mass.clamp_min(torch.finfo(mass.dtype).tiny).log()


def top_k_divergence(divergence: Divergence, student: Distributions, top: TopK, kls: bool) -> tuple[Tensor, ...]:
    """Divergence [R] over K + 1 outcomes and its gradient [R, V] with respect to the student's z / T.

    The last outcome is "any other token". The student's mass there is added up over its own full softmax, and its
    gradient is spread over those tokens in proportion to their probability.

    Returns:
        D, gradient, and with `kls` the forward and the reverse KL of the same outcomes.
    """
    if top.tail == "renormalize_both":
        return _within_top_k(divergence, student, top, kls)
    if top.tail == "ignore":
        return _top_k_alone(divergence, student, top, kls)
    top_p = student.p.gather(1, top.ids)
    a, b = student.log_p.gather(1, top.ids), top.log_q
    rest = None
    if top.log_tail is not None:
        rest = student.p.scatter_(1, top.ids, 0).sum(dim=-1, keepdim=True)
        student.p.scatter_(1, top.ids, top_p)
        a, b = torch.cat([a, log_of(rest)], dim=1), torch.cat([b, top.log_tail], dim=1)
    p, q = a.exp(), b.exp()
    extra = both_kls(a, b, p, q) if kls else ()
    value, slope = divergence.value_and_slope(a.clone(), b.clone(), p, q)
    total = slope.sum(dim=-1, keepdim=True)
    k = top.ids.shape[1]
    if rest is None:
        gradient = student.p * -total
    else:
        gradient = student.p * (slope[:, k:] / rest.clamp_min(torch.finfo(rest.dtype).tiny) - total)
    gradient.scatter_(1, top.ids, slope[:, :k] - top_p * total)
    return (value, gradient, *extra)


def _within_top_k(divergence: Divergence, student: Distributions, top: TopK, kls: bool) -> tuple[Tensor, ...]:
    """The same over K outcomes, both models given that it is one of them: other tokens have no gradient."""
    a, b = student.log_p.gather(1, top.ids), top.log_q
    a = a - a.logsumexp(dim=-1, keepdim=True)
    p, q = a.exp(), b.exp()
    extra = both_kls(a, b, p, q) if kls else ()
    value, slope = divergence.value_and_slope(a.clone(), b.clone(), p, q)
    gradient = torch.zeros_like(student.p).scatter_(1, top.ids, softmax_gradient_(slope, p))
    return (value, gradient, *extra)


def _top_k_alone(divergence: Divergence, student: Distributions, top: TopK, kls: bool) -> tuple[Tensor, ...]:
    """sum over the K tokens of q (log q - log p), and nothing of the others. Below 0 where the student holds more of
    its mass there than the teacher.

    `forward_kl` adds p - q to each term, which is no matter over all outcomes; here it is taken back.
    """
    assert divergence.name == "forward_kl"
    a, b = student.log_p.gather(1, top.ids), top.log_q
    p, q = a.exp(), b.exp()
    extra = both_kls(a, b, p, q) if kls else ()
    value = (q * (b - a)).sum(dim=-1)
    gradient = (student.p * q.sum(dim=-1, keepdim=True)).scatter_add_(1, top.ids, -q)
    return (value, gradient, *extra)
