"""Cases about a loss by itself: the mean divergence over the targets of a batch, and its gradient.

Shapes: B rows, T positions, Ds and Dt hidden sizes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from conformance.definition import jsd
from conformance.result import Case, Result, judged

TOLERANCE = 1e-4  # of losses in fp32, relative to their size and absolute


@dataclass(frozen=True)
class LossCall:
    """Attributes:
    student_hidden: [B, T, Ds]. student_head: [V, Ds]. teacher_hidden: [B, T, Dt]. teacher_head: [V, Dt].
    labels: [B, T] the token that each position predicts, -100 where there is no target.
    beta, temperature: of the generalized JSD.
    """

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    beta: float = 0.5
    temperature: float = 1.0
    leaves: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", (self.student_hidden, self.student_head))

    def logits(self) -> tuple[Tensor, Tensor]:
        """Of student and teacher, [B, T, V]."""
        return self.student_hidden @ self.student_head.T, self.teacher_hidden @ self.teacher_head.T

    def with_new_leaves(self, dtype: torch.dtype) -> LossCall:
        """The same in another dtype, with leaves of its own."""
        hidden, head = (x.detach().to(dtype).requires_grad_() for x in self.leaves)
        return replace(
            self,
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=self.teacher_hidden.to(dtype),
            teacher_head=self.teacher_head.to(dtype),
        )


def call(vocab: int = 40, teacher_vocab: int = 0, scale: float = 1.0, seed: int = 0, **options: Any) -> LossCall:
    """Random hidden states and heads; two rows with prompts and padding of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    ours, theirs = 8, 12
    labels = torch.randint(0, vocab, (2, 9), generator=draw)
    labels[0, :3], labels[0, 8:], labels[1, :5] = -100, -100, -100

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return LossCall(
        normal(2, 9, ours).mul(scale).requires_grad_(),
        normal(vocab, ours).requires_grad_(),
        normal(2, 9, theirs).mul(scale),
        normal(teacher_vocab or vocab, theirs),
        labels,
        **options,
    )


def defined(call: LossCall) -> tuple[float, list[Tensor]]:
    """The loss by its definition, and the gradients of hidden states and head, in float64."""
    exact = call.with_new_leaves(torch.float64)
    keep = exact.labels != -100
    ours, theirs = (z[keep] / exact.temperature for z in exact.logits())
    shared = min(ours.shape[-1], theirs.shape[-1])
    value = jsd(ours[:, :shared].log_softmax(-1), theirs[:, :shared].log_softmax(-1), exact.beta).mean()
    return float(value.detach()), list(torch.autograd.grad(value, exact.leaves))


def found(adapter: Any, call: LossCall) -> tuple[float, list[Tensor]]:
    """The same of an adapter."""
    fresh = call.with_new_leaves(torch.float32)
    value = adapter.loss(fresh)
    return float(value.detach()), list(torch.autograd.grad(value, fresh.leaves))


def against_definition(adapter: Any, call: LossCall, words: str) -> Result | None:
    """None where loss and gradients are those of the definition."""
    (value, gradients), (wanted, exact) = found(adapter, call), defined(call)
    if not abs(value - wanted) <= TOLERANCE * (1 + abs(wanted)):
        return Result("fail", f"{words}: loss {value:.4g}, by definition {wanted:.4g}")
    for name, ours, right in zip(("hidden states", "head"), gradients, exact, strict=True):
        error, size = float((ours.double() - right).norm()), float(right.norm())
        if not error < 1e-3 * size + 1e-5:  # where all is said, the gradient is nothing but rounding
            return Result("fail", f"{words}: the gradient of the {name} is {size:.3g} long, and off by {error:.3g}")
    return None


def _all(adapter: Any, calls: dict[str, LossCall], good: str) -> Result:
    for words, one in calls.items():
        wrong = against_definition(adapter, one, words)
        if wrong is not None:
            return wrong
    return Result("pass", good)


def beta(adapter: Any) -> Result:
    """0 is KL(teacher || student), 1 is KL(student || teacher), and between Eq. 1 of the GKD paper."""
    values = (0.0, 0.1, 0.5, 0.9, 1.0)
    return _all(adapter, {f"beta {b:g}": call(beta=b) for b in values}, "beta 0, 0.1, 0.5, 0.9, 1")


def temperature(adapter: Any) -> Result:
    """Both sets of logits are divided by it, in the value and in the gradient."""
    calls = {f"T = {t:g}, beta {b:g}": call(temperature=t, beta=b) for t in (0.5, 2.0) for b in (0.0, 0.5, 1.0)}
    return _all(adapter, calls, "T = 0.5 and 2")


def sure(adapter: Any) -> Result:
    """Distributions with all mass on a token each, far apart."""
    calls = {f"beta {b:g}": call(beta=b, scale=15.0, seed=1) for b in (0.0, 0.5, 1.0)}
    return _all(adapter, calls, "logits up to 200 apart")


def masks(adapter: Any) -> Result:
    """What prompts and padding hold changes nothing, and gets no gradient."""
    plain = call()
    wild = call()
    outside = wild.labels == -100
    with torch.no_grad():
        wild.student_hidden[outside] *= 1000
        wild.teacher_hidden[outside] *= -1000
    (value, gradients), (other, also) = found(adapter, plain), found(adapter, wild)
    leak = float(also[0][outside].abs().max())
    same = abs(value - other) < TOLERANCE and torch.allclose(gradients[1], also[1], atol=1e-4)
    return judged(same and leak == 0, f"loss {value:.4g} and {other:.4g}, gradient outside the targets {leak:.2g}")


def no_targets(adapter: Any) -> Result:
    """A micro-batch of which nothing is a target adds nothing."""
    empty = call()
    empty.labels.fill_(-100)
    value, gradients = found(adapter, empty)
    good = value == 0 and all(not g.any() for g in gradients)
    return judged(good, f"loss {value:g}")


def equal_models(adapter: Any) -> Result:
    """Loss and gradient are 0."""
    worst = 0.0
    for b in (0.0, 0.5, 1.0):
        one = call(beta=b)
        same = replace(one, teacher_hidden=one.student_hidden.detach(), teacher_head=one.student_head.detach())
        value, gradients = found(adapter, same)
        worst = max(worst, abs(value), *(float(g.abs().max()) for g in gradients))
    return judged(worst < 1e-6, f"at most {worst:.1g}")


def never_negative(adapter: Any) -> Result:
    """A divergence is not below 0, where the student is in fp32 and the teacher, the same weights, in bf16."""
    least = 0.0
    for b in (0.0, 0.5, 1.0):
        for seed in range(3):
            one = call(vocab=400, beta=b, seed=seed)
            rounded = [x.detach().bfloat16() for x in one.leaves]
            hidden, head = (x.float().requires_grad_() for x in rounded)
            same = replace(
                one, student_hidden=hidden, student_head=head, teacher_hidden=rounded[0], teacher_head=rounded[1]
            )
            least = min(least, float(adapter.loss(same)))
    return judged(least > -1e-6, f"least loss {least:.1g}")


def _padding(vocab: int, teacher_vocab: int) -> LossCall:
    """The larger head has rows behind the vocabulary that no model ever writes: probability 0."""
    one = call(vocab=vocab, teacher_vocab=teacher_vocab)
    shared = min(vocab, teacher_vocab)
    with torch.no_grad():
        for hidden, head in (one.leaves, (one.teacher_hidden, one.teacher_head)):
            hidden[..., 0] = 1
            head[shared:] = 0
            head[shared:, 0] = -1e4
    one.labels[one.labels >= shared] = 0
    return one


def padded_teacher(adapter: Any) -> Result:
    """The teacher's head has padding rows, of probability 0, that the student's has not."""
    return _all(adapter, {f"beta {b:g}": replace(_padding(40, 48), beta=b) for b in (0.0, 0.5, 1.0)}, "40 and 48 rows")


def padded_student(adapter: Any) -> Result:
    """The student's head has padding rows, of probability 0, that the teacher's has not."""
    return _all(adapter, {f"beta {b:g}": replace(_padding(48, 40), beta=b) for b in (0.0, 0.5, 1.0)}, "48 and 40 rows")


GROUP = "The loss by itself"
CASES = [
    Case("beta: both ends and between", GROUP, beta),
    Case("loss temperature, in value and gradient", GROUP, temperature),
    Case("models that are sure", GROUP, sure),
    Case("prompts and padding have no say", GROUP, masks),
    Case("a micro-batch without targets", GROUP, no_targets),
    Case("equal models: loss 0, gradient 0", GROUP, equal_models),
    Case("never below 0 with a bf16 teacher", GROUP, never_negative),
    Case("a teacher's head with padding rows", GROUP, padded_teacher),
    Case("a student's head with padding rows", GROUP, padded_student),
]
