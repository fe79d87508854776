r"""What a divergence of two next-token distributions is: an integrand and its derivative.

Shapes: V outcomes (the vocabulary, or K + 1 with a tail bucket). `a` = log p_student, `b` = log p_teacher, both
[..., V], normalised over the last dimension, in nats, fp32 or fp64. Write p = e^a (student) and q = e^b (teacher).

Every divergence is a sum over the vocabulary, `D = sum_v phi(a_v, b_v)`. With `phi_a = d phi / d a`, its gradient with
respect to the student's logits z (p = softmax(z / T)) is the same expression for all of them:

    dD/dz_v = (phi_a(v) - p_v * sum_u phi_a(u)) / T

so a divergence is two elementwise expressions, and `gkd.loss.fused` owns everything else (softmax, chunks, projection,
weights, gradient). `phi` alone is enough: autograd then supplies `phi_a`, one small block of tokens at a time.

Two freedoms are used below. A multiple of `p - q` may be added to `phi` (it sums to zero) and a multiple of p to
`phi_a` (it cancels in the formula above). They are chosen so that every `phi` is >= 0 for each v on its own, and
`phi_a` is 0 wherever p = q. A sum of non-negative terms cannot come out negative by rounding, and a student equal to
its teacher gets a loss and a gradient of exactly zero.

Convention: GKD (Agarwal et al., arXiv 2306.13649, Eq. 1) writes P for the teacher and Q for the student and
M = beta P + (1 - beta) Q; the formulas here say "teacher" and "student" in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Integrand = Callable[[Tensor, Tensor], Tensor]
Fast = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Divergence:
    """A divergence of the student's from the teacher's distribution.

    Attributes:
        name: for messages and logs.
        phi: `phi(a, b)` [..., V] -> [..., V]; summed over v it is the divergence in nats. Differentiable in `a` when
            `phi_a` is left out.
        phi_a: `d phi / d a`, or None: autograd derives it.
        fast: an equal but quicker `(a, b, p, q) -> (D [...], phi_a [..., V])` that may overwrite a, b and q (never
            p), or None. `phi` and `phi_a` remain the definition; a test compares the two.
        needs_teacher_support: infinite where the teacher has no mass and the student has (reverse KL).
        traceable: whether `torch.compile` can trace phi and phi_a: no branch in them depends on values.
    """

    name: str
    phi: Integrand = field(repr=False)
    phi_a: Integrand | None = field(default=None, repr=False)
    fast: Fast | None = field(default=None, repr=False)
    needs_teacher_support: bool = False
    traceable: bool = True

    def value_and_slope(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence of each token and `phi_a`; a, b and q are used up, p = e^a is left alone.

        Args:
            a: log p_student [R, V]. b: log p_teacher [R, V]. p: e^a. q: e^b.

        Returns:
            D [R] and phi_a [R, V].
        """
        if self.fast is not None:
            return self.fast(a, b, p, q)
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
