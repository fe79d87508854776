"""Each divergence: its equation, its paper, `phi` and `phi_a` (see `gkd.loss.integrand`), and a quick form of both.

Notation as there: a = log p of the student, b = log q of the teacher, p = e^a, q = e^b.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from gkd.loss.integrand import Divergence, Integrand

# Near beta = 0 and 1 the loss shrinks like beta (1 - beta): at 0.05 it is about a twentieth of the KL it resembles.
_BETA_EDGE = 0.05


def kl_to_mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """Integrand of KL(p || (1 - share) p + share q), elementwise: -p log1p(share (q - p) / p).

    From probabilities, not from log-probabilities: exactly zero where p = q, and accurate when p and q are close,
    where log p - log m loses every digit. p = 0 gives 0 (the quotient stays finite, then is multiplied by 0).
    """
    ratio = (q - p) / p.clamp_min(torch.finfo(p.dtype).tiny)
    return -p * torch.log1p(share * ratio)


def check_beta(beta: float) -> None:
    """Raise for a beta outside [0, 1]; warn near its ends, where the loss is much smaller than the KL it resembles."""
    if not 0 <= beta <= 1:
        raise ValueError(
            f"beta must be between 0 and 1, got {beta}: 0 = KL(teacher||student), 1 = KL(student||teacher)"
        )
    if 0 < beta < _BETA_EDGE or 1 - _BETA_EDGE < beta < 1:
        end = "0 (forward KL)" if beta < 0.5 else "1 (reverse KL)"
        warnings.warn(
            f"beta={beta}: the generalized JSD scales like beta(1-beta) = {beta * (1 - beta):.3g}, so gradients are "
            f"that much smaller than the KL's. For the KL itself use beta={end}.",
            stacklevel=4,
        )


# --- Kullback-Leibler ----------------------------------------


def _forward_phi(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.exp(), b.exp()
    return q * (b - a) + p - q


def _forward_phi_a(a: Tensor, b: Tensor) -> Tensor:
    return a.exp() - b.exp()


def _forward_fast(a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    value_terms = b.sub_(a).mul_(q)
    slope = torch.sub(p, q, out=a)
    return value_terms.add_(slope).sum(-1), slope


def forward_kl() -> Divergence:
    """KL(teacher || student) = sum q (log q - log p): mean-seeking, the classic distillation loss. GKD's beta -> 0."""
    return Divergence("forward_kl", _forward_phi, _forward_phi_a, _forward_fast)


def _reverse_phi(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.exp(), b.exp()
    return p * (a - b) - p + q


def _reverse_phi_a(a: Tensor, b: Tensor) -> Tensor:
    return a.exp() * (a - b)


def _reverse_fast(a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    slope = a.sub_(b).mul_(p)
    value = torch.add(slope, q.sub_(p), out=b).sum(-1)
    return value, slope


def reverse_kl() -> Divergence:
    """KL(student || teacher) = sum p (log p - log q): mode-seeking, the usual on-policy loss. GKD's beta -> 1."""
    return Divergence("reverse_kl", _reverse_phi, _reverse_phi_a, _reverse_fast, needs_teacher_support=True)


def symmetric_kl(symmetric_kl_weight: float = 0.5) -> Divergence:
    """w KL(teacher || student) + (1 - w) KL(student || teacher), the same w for every token; at 1/2 it is half of
    Jeffreys' divergence. w = 1 is the forward KL and w = 0 the reverse KL, exactly.

    Raises:
        ValueError: symmetric_kl_weight outside [0, 1].
    """
    if not 0 <= symmetric_kl_weight <= 1:
        raise ValueError(
            f"symmetric_kl_weight must be between 0 and 1, got {symmetric_kl_weight}: it is the share of the forward "
            "KL, KL(teacher||student)"
        )
    forward, reverse = symmetric_kl_weight, 1 - symmetric_kl_weight
    if reverse == 0:
        return forward_kl()
    if forward == 0:
        return reverse_kl()

    def phi(a: Tensor, b: Tensor) -> Tensor:
        return forward * _forward_phi(a, b) + reverse * _reverse_phi(a, b)

    def phi_a(a: Tensor, b: Tensor) -> Tensor:
        return forward * _forward_phi_a(a, b) + reverse * _reverse_phi_a(a, b)

    def fast(a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        gap, ratio = torch.sub(p, q), a.sub_(b)
        weighted = torch.mul(ratio, p, out=b)  # p (log p - log q)
        # forward: gap - q ratio. reverse: p ratio - gap. Both are >= 0 for each token on its own.
        of_teacher = torch.sub(gap, q.mul_(ratio), out=q).sum(-1)
        of_student = torch.sub(weighted, gap, out=ratio).sum(-1)
        slope = gap.mul_(forward).add_(weighted, alpha=reverse)
        return of_teacher.mul_(forward).add_(of_student, alpha=reverse), slope

    name = f"symmetric_kl(symmetric_kl_weight={symmetric_kl_weight})"
    return Divergence(name, phi, phi_a, fast, needs_teacher_support=True)


# --- generalized Jensen-Shannon ----------------------------------------


def jsd(beta: float = 0.5) -> Divergence:
    """Generalized JSD (GKD Eq. 1): beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1-beta)
    student. beta = 0 is the forward KL and beta = 1 the reverse KL, exactly; between them the value scales like
    beta (1 - beta), so beta moves the effective learning rate too.

    Raises:
        ValueError: beta outside [0, 1].
    """
    check_beta(beta)
    if beta == 0:
        return forward_kl()
    if beta == 1:
        return reverse_kl()

    def phi(a: Tensor, b: Tensor) -> Tensor:
        p, q = a.exp(), b.exp()
        return beta * kl_to_mixture(q, p, 1 - beta) + (1 - beta) * kl_to_mixture(p, q, beta)

    def phi_a(a: Tensor, b: Tensor) -> Tensor:  # (1 - beta) p (log p - log m), up to a multiple of p that cancels
        return (1 - beta) * kl_to_mixture(a.exp(), b.exp(), beta)

    def fast(a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        # log(p / m) instead of log1p: a third of the time, as exact at p = q, and 1e-7 p away from it next to it.
        tiny = torch.finfo(p.dtype).tiny
        above_zero = torch.clamp_min(p, tiny, out=a)
        mixture = torch.lerp(above_zero, q.clamp_min_(tiny), beta, out=b)
        slope = above_zero.div_(mixture).log_().mul_(p).mul_(1 - beta)
        of_teacher = torch.div(q, mixture, out=b).log_().mul_(q).sum(-1)
        return slope.sum(-1).add_(of_teacher, alpha=beta), slope

    return Divergence(f"jsd(beta={beta})", phi, phi_a, fast)


# --- skewed KL (DistiLLM, arXiv 2402.03898) ----------------------------------------
#
# DistiLLM's alpha is skew_lambda here: the share of the *first* argument of the KL in the mixture. In terms of GKD's
# M(beta) = beta teacher + (1 - beta) student, the forward skew uses M(lambda) and the reverse skew M(1 - lambda):
#     JSD(beta) = beta SKL(lambda = beta) + (1 - beta) SRKL(lambda = 1 - beta).


def _check_skew(skew_lambda: float) -> None:
    if not 0 <= skew_lambda < 1:
        raise ValueError(
            f"skew_lambda must be in [0, 1), got {skew_lambda}: 0 is the plain KL, and at 1 the divergence is always 0"
        )


def skew_forward_kl(skew_lambda: float = 0.1) -> Divergence:
    """KL(teacher || lambda teacher + (1 - lambda) student); finite even where the student has no mass.

    Raises:
        ValueError: skew_lambda outside [0, 1).
    """
    _check_skew(skew_lambda)
    if skew_lambda == 0:
        return forward_kl()
    rest = 1 - skew_lambda

    def phi(a: Tensor, b: Tensor) -> Tensor:
        p, q = a.exp(), b.exp()
        return kl_to_mixture(q, p, rest) + rest * (p - q)

    def phi_a(a: Tensor, b: Tensor) -> Tensor:  # rest p (1 - q / m)
        p, q = a.exp(), b.exp()
        mixture = (skew_lambda * q + rest * p).clamp_min(torch.finfo(p.dtype).tiny)
        return rest * rest * (p / mixture) * (p - q)

    return Divergence(f"skew_forward_kl(skew_lambda={skew_lambda})", phi, phi_a)


def skew_reverse_kl(skew_lambda: float = 0.1) -> Divergence:
    """KL(student || (1 - lambda) teacher + lambda student); finite even where the teacher has no mass.

    Raises:
        ValueError: skew_lambda outside [0, 1).
    """
    _check_skew(skew_lambda)
    if skew_lambda == 0:
        return reverse_kl()
    rest = 1 - skew_lambda

    def phi(a: Tensor, b: Tensor) -> Tensor:
        p, q = a.exp(), b.exp()
        return kl_to_mixture(p, q, rest) + rest * (q - p)

    def phi_a(a: Tensor, b: Tensor) -> Tensor:  # p (log p - log m) + lambda p (1 - p / m)
        p, q = a.exp(), b.exp()
        mixture = (rest * q + skew_lambda * p).clamp_min(torch.finfo(p.dtype).tiny)
        return kl_to_mixture(p, q, rest) + skew_lambda * rest * (p / mixture) * (q - p)

    return Divergence(f"skew_reverse_kl(skew_lambda={skew_lambda})", phi, phi_a)


# --- total variation ----------------------------------------


def total_variation() -> Divergence:
    """1/2 sum |p - q|, in [0, 1]: bounded, symmetric; with lmbda = 0.5 it is f-distill's loss (arXiv 2307.15190)."""

    def phi(a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (a.exp() - b.exp()).abs()

    def phi_a(a: Tensor, b: Tensor) -> Tensor:
        p = a.exp()
        return 0.5 * torch.sign(p - b.exp()) * p

    return Divergence("total_variation", phi, phi_a)


# --- adaptive KL (arXiv 2404.02657) ----------------------------------------


def _head_gap_share(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """Share [..., 1] of |p - q| that lies on the teacher's head: its most likely outcomes up to a total mass of mu.

    The most likely outcome always counts as head. Equal distributions get 1/2. A constant, not differentiated.
    """
    gap = (p - q).abs()
    total = gap.sum(-1, keepdim=True)
    # The head is almost always short: look at the top few first, and sort everything only if they do not reach mu.
    for size in (1024, q.shape[-1]):
        top, ids = q.topk(min(size, q.shape[-1]), dim=-1)
        mass = top.cumsum(-1)
        if size >= q.shape[-1] or bool((mass[..., -1] > mu).all()):
            break
    in_head = mass <= mu
    in_head[..., 0] = True
    head = torch.where(in_head, gap.gather(-1, ids), 0.0).sum(-1, keepdim=True)
    return torch.where(total > 0, head / total.clamp_min(torch.finfo(p.dtype).tiny), 0.5)


def adaptive_kl(akl_mu: float = 0.5) -> Divergence:
    """g KL(teacher || student) + (1 - g) KL(student || teacher), with g, token by token, the share of the gap
    sum |p - q| that lies on the teacher's head (its most likely outcomes up to mass akl_mu). Forward KL fits the head
    first and reverse KL the tail; each gets the weight of its part of the gap. g is not differentiated.

    Raises:
        ValueError: akl_mu outside (0, 1).
    """
    if not 0 < akl_mu < 1:
        raise ValueError(f"akl_mu must be between 0 and 1, got {akl_mu}: it is the teacher mass called its head")

    def blend(a: Tensor, b: Tensor, forward: Integrand, reverse: Integrand) -> Tensor:
        share = _head_gap_share(a.detach().exp(), b.detach().exp(), akl_mu)
        return share * forward(a, b) + (1 - share) * reverse(a, b)

    def phi(a: Tensor, b: Tensor) -> Tensor:
        return blend(a, b, _forward_phi, _reverse_phi)

    def phi_a(a: Tensor, b: Tensor) -> Tensor:
        return blend(a, b, _forward_phi_a, _reverse_phi_a)

    def fast(a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        share = _head_gap_share(p, q, akl_mu)
        gap = p - q
        ratio = a.sub_(b)
        value = share.squeeze(-1) * (gap - q * ratio).sum(-1) + (1 - share).squeeze(-1) * (p * ratio - gap).sum(-1)
        return value, gap.mul_(share).add_(ratio.mul_(p).mul_(1 - share))

    name = f"adaptive_kl(akl_mu={akl_mu})"
    return Divergence(name, phi, phi_a, fast, needs_teacher_support=True, traceable=False)


# --- alpha-beta divergence (Cichocki et al., Entropy 2011; for distillation: ABKD, arXiv 2505.04560) ---


def alpha_beta(ab_alpha: float = 0.5, ab_beta: float = 0.5) -> Divergence:
    """-1/(alpha beta) sum [q^alpha p^beta - alpha/(alpha+beta) q^(alpha+beta) - beta/(alpha+beta) p^(alpha+beta)].

    alpha is the teacher's exponent and beta the student's. (1, 0) is the limit forward KL, (0, 1) the reverse KL,
    (0.5, 0.5) four times the squared Hellinger distance 1/2 sum (sqrt p - sqrt q)^2, (1, 1) half the squared distance.

    Raises:
        ValueError: ab_alpha or ab_beta not above 0.
    """
    if ab_alpha <= 0 or ab_beta <= 0 or not math.isfinite(ab_alpha + ab_beta):
        raise ValueError(
            f"ab_alpha and ab_beta must be above 0, got {ab_alpha} and {ab_beta}: for the limits (1, 0) and (0, 1) "
            "use divergence='forward_kl' and 'reverse_kl'"
        )
    scale = 1 / (ab_alpha * ab_beta * (ab_alpha + ab_beta))

    def phi(a: Tensor, b: Tensor) -> Tensor:
        # Factored so that each bracket is exactly zero where p = q.
        pa, pb, qa, qb = (ab_alpha * a).exp(), (ab_beta * a).exp(), (ab_alpha * b).exp(), (ab_beta * b).exp()
        return scale * (ab_alpha * qa * (qb - pb) + ab_beta * pb * (pa - qa))

    def phi_a(a: Tensor, b: Tensor) -> Tensor:
        return (ab_beta * a).exp() * ((ab_alpha * a).exp() - (ab_alpha * b).exp()) / ab_alpha

    return Divergence(f"alpha_beta(ab_alpha={ab_alpha}, ab_beta={ab_beta})", phi, phi_a)
