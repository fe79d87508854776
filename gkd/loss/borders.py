"""Tokens at which two models of different tokenizers stand at one place of the text: common tokens and the rest.

Shapes: N target tokens at a border, V vocabulary, S tokens that both spell alike, R tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gkd.loss import eager
from gkd.loss.chunks import FusedPass, even_cuts
from gkd.loss.compiled import Constants
from gkd.loss.projection import Projection
from gkd.loss.signals import AlignedSignal


class BorderPass(FusedPass):
    """The tokens at a border, with the teacher's row for each: S outcomes and the rest.

    Where one side has no other tokens there is no rest, and both are compared given that the token is a common one.
    """

    def __init__(self, student: Projection, teacher: Projection, *, aligned: AlignedSignal, own: Tensor, **work: Any):
        super().__init__(student, teacher, **work)
        self.own, device = own, self.targets.device
        rows = [model.weight.shape[0] for model in (student, teacher)]
        self.of_student = _Outcomes(aligned.student_ids, aligned.student_joined, rows[0], self.dtype, device)
        self.of_teacher = _Outcomes(aligned.teacher_ids, aligned.teacher_joined, rows[1], self.dtype, device)
        self.has_rest = self.of_student.others > 0 and self.of_teacher.others > 0

    def _constants(self) -> Constants | None:
        return None  # nothing of this is compiled

    def run(self) -> dict[str, Tensor]:
        """What is said about each token, by name."""
        for at in even_cuts(self.targets.shape[0], self.chunk):
            self.run_chunk(at)
        self.tokens["divergence"].mul_(self.squared)
        return self.tokens

    def _run_block(self, at: slice, z_student: Tensor, z_teacher: Tensor | None) -> None:
        assert self.teacher is not None
        assert z_teacher is not None
        r, settings, tokens = at.stop - at.start, self.settings, self.tokens
        if self.buffers is None:
            self.buffers = z_student.new_empty(2, self.block, self.vocab, dtype=self.dtype)
            self.teacher_buffers = z_teacher.new_empty(2, self.block, z_teacher.shape[1], dtype=self.dtype)
        (p, scratch), (q, teacher_scratch) = self.buffers[:, :r], self.teacher_buffers[:, :r]
        z, slope_of_cap = self.student.logits(z_student)
        zt = self.teacher.logits(z_teacher)[0]
        eager.shift_(z), eager.shift_(zt)
        student = eager.distributions(z, self.targets[at], settings.loss_temperature, p, scratch)
        teacher = eager.distributions(zt, self.own[at], settings.teacher_temperature, q, teacher_scratch)
        tokens["student_entropy"][at], tokens["teacher_entropy"][at] = student.entropy, teacher.entropy
        tokens["teacher_log_prob"][at] = teacher.chosen
        if self.ce_weights is not None:
            tokens["cross_entropy"][at] = -student.chosen
        common = self.of_student.common(student), self.of_teacher.common(teacher)
        most = student.log_p.amax(dim=-1, keepdim=True) + teacher.log_p.amax(dim=-1, keepdim=True)
        tokens["agreement"][at] = (common[0] + common[1]).eq(most).any(dim=-1).to(self.dtype)
        a, of_a = self.of_student.take(student, common[0], self.has_rest)
        b, of_b = self.of_teacher.take(teacher, common[1], self.has_rest)
        if settings.report_kls:
            tokens["forward_kl"][at], tokens["reverse_kl"][at] = eager.both_kls(a, b, of_a, of_b)
        tokens["divergence"][at], slope = settings.divergence.value_and_slope(a, b, of_a, of_b)
        if self.gradients.any:
            gradient = self._spread(slope, of_a, student.p, scratch)
            self._finish_gradient(gradient, at, student, slope_of_cap)
            z_student.copy_(gradient)

    def _spread(self, slope: Tensor, of_a: Tensor, p: Tensor, out: Tensor) -> Tensor:
        """The gradient [R, V] with respect to the student's z / T, of phi_a by outcome [R, S + 1].

        The rest's part goes to its tokens in proportion to their probability, p_v / p_rest.
        """
        if not self.has_rest:
            return self.of_student.spread_(out.zero_(), eager.softmax_gradient_(slope, of_a), p)
        size, total = slope.shape[1] - 1, slope.sum(dim=-1, keepdim=True)
        torch.mul(slope[:, size:] / of_a[:, size:], self.of_student.rest, out=out)
        return self.of_student.spread_(out.sub_(total).mul_(p), slope[:, :size], p)


class _Outcomes:
    """How one model's V tokens make S outcomes and the rest."""

    def __init__(self, ids: Tensor, joined: Tensor | None, vocab: int, dtype: torch.dtype, device: torch.device):
        self.ids, self.joined = ids, joined
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
