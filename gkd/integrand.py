"""What a divergence is: an integrand over the vocabulary and its derivative. The formulas are in `gkd.divergence`.

Shapes: V outcomes, R rows. a = log p_student, b = log p_teacher, p = e^a, q = e^b; nats, fp32 or fp64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Integrand = Callable[[Tensor, Tensor], Tensor]
RowsFn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Near beta = 0 and 1 the loss shrinks like beta (1 - beta): at 0.05 it is about a twentieth of the KL it resembles.
_BETA_EDGE = 0.05


@dataclass(frozen=True)
class Divergence:
    """A divergence of the student's from the teacher's distribution.

    Attributes:
        name: for messages and logs.
        phi: `phi(a, b)` [..., V] -> [..., V]; summed over v it is the divergence in nats. Differentiable in `a` when
            `phi_a` is left out.
        phi_a: `d phi / d a`, or None: autograd derives it.
        rows_fn: an equal but faster `(a, b, p, q) -> (D [...], phi_a [..., V])` that may overwrite a, b and q (never
            p), or None. `phi` and `phi_a` remain the definition; a test compares the two.
        needs_teacher_support: infinite where the teacher has no mass and the student has (reverse KL).
        traceable: whether `torch.compile` can trace phi and phi_a: no branch in them depends on values.
    """

    name: str
    phi: Integrand = field(repr=False)
    phi_a: Integrand | None = field(default=None, repr=False)
    rows_fn: RowsFn | None = field(default=None, repr=False)
    needs_teacher_support: bool = False
    traceable: bool = True

    def rows(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence of each row and `phi_a`; a, b and q are used up, p = e^a is left alone.

        Args:
            a: log p_student [R, V]. b: log p_teacher [R, V]. p: e^a. q: e^b.

        Returns:
            D [R] and phi_a [R, V].
        """
        if self.rows_fn is not None:
            return self.rows_fn(a, b, p, q)
        if self.phi_a is not None:
            return self.phi(a, b).sum(-1), self.phi_a(a, b)
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            values = self.phi(leaf, b.detach()).sum(-1)
            (slope,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), slope

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Divergence [...] of log-probabilities a (student) and b (teacher) [..., V]; differentiable through `phi`."""
        return self.phi(a, b).sum(-1)


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
