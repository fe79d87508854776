"""The definitions of the divergences in float64, from probabilities, as the papers print them. Slow and plain.

Nothing here is shared with the package: no log-space trick, no chunk, no analytic gradient (autograd gives it).
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > 0, x * (x.log() - y.log()), 0.0).sum(-1)


def divergence(name: str, student: Tensor, teacher: Tensor, **parameters: float) -> Tensor:
    """Divergence of each row of probabilities [..., V]."""
    s, t = student, teacher
    if name == "forward_kl":
        return kl(t, s)
    if name == "reverse_kl":
        return kl(s, t)
    if name == "jsd":
        beta = parameters.get("beta", 0.5)
        if beta in (0, 1):
            return kl(t, s) if beta == 0 else kl(s, t)
        mixture = beta * t + (1 - beta) * s
        return beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)
    if name == "skew_forward_kl":
        share = parameters.get("skew_lambda", 0.1)
        return kl(t, share * t + (1 - share) * s)
    if name == "skew_reverse_kl":
        share = parameters.get("skew_lambda", 0.1)
        return kl(s, (1 - share) * t + share * s)
    if name == "symmetric_kl":
        weight = parameters.get("symmetric_kl_weight", 0.5)
        return weight * kl(t, s) + (1 - weight) * kl(s, t)
    if name == "total_variation":
        return 0.5 * (s - t).abs().sum(-1)
    if name == "adaptive_kl":
        weight = head_share(s.detach(), t, parameters.get("akl_mu", 0.5))
        return weight * kl(t, s) + (1 - weight) * kl(s, t)
    if name == "alpha_beta":
        x, y = parameters.get("ab_alpha", 0.5), parameters.get("ab_beta", 0.5)
        inner = t**x * s**y - x / (x + y) * t ** (x + y) - y / (x + y) * s ** (x + y)
        return -inner.sum(-1) / (x * y)
    raise AssertionError(name)


def head_share(student: Tensor, teacher: Tensor, mu: float) -> Tensor:
    shares = []
    for s, t in zip(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1]), strict=True):
        order, mass, head = torch.argsort(t, descending=True).tolist(), 0.0, 0.0
        for rank, v in enumerate(order):
            mass += float(t[v])
            if rank == 0 or mass <= mu:
                head += float((s[v] - t[v]).abs())
        total = float((s - t).abs().sum())
        shares.append(head / total if total > 0 else 0.5)
    return torch.tensor(shares, dtype=student.dtype).reshape(student.shape[:-1])


def coarse(student: Tensor, teacher: Tensor, k: int, tail: str) -> tuple[Tensor, Tensor]:
    """Probabilities over the teacher's top k and one outcome for all the rest [N, k + 1]."""
    ids = teacher.topk(k, dim=-1).indices
    s, t = student.gather(-1, ids), teacher.gather(-1, ids)
    s_rest, t_rest = 1 - s.sum(-1, keepdim=True), 1 - t.sum(-1, keepdim=True)
    if tail == "renormalize":
        t, t_rest = t / t.sum(-1, keepdim=True), torch.zeros_like(t_rest)
    if tail == "renormalize_both":
        return s / s.sum(-1, keepdim=True), t / t.sum(-1, keepdim=True)
    if tail == "ignore":  # as they are: they sum to less than 1
        return s, t
    return torch.cat([s, s_rest], -1), torch.cat([t, t_rest], -1)
