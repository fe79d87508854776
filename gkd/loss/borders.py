"""Tokens at which two models of different tokenizers stand at one place of the text: the pass over them.

Shapes: N target tokens at a border, V vocabulary, S tokens that both spell alike, R tokens of a block, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gkd.loss import eager
from gkd.loss.chunks import FusedPass, even_cuts
from gkd.loss.compiled import Constants
from gkd.loss.outcomes import Outcomes, most_likely_outcomes
from gkd.loss.projection import Projection
from gkd.loss.signals import AlignedSignal, TopKSignal


class BorderPass(FusedPass):
    """The tokens at a border, with the teacher's row for each: S outcomes and the rest.

    Where one side has no other tokens there is no rest, and both are compared given that the token is a common one.

    Of a teacher's K most likely tokens: the outcomes that these count with, each with the mass of those that do. All
    else is the rest: the teacher's other tokens, also those that would count with one of the outcomes, and the
    student's tokens of all other outcomes.
    """

    def __init__(
        self, student: Projection, teacher: Projection | None, *, aligned: AlignedSignal, own: Tensor, **work: Any
    ):
        super().__init__(student, teacher, **work)
        self.own, device = own, self.targets.device
        self.of_student = Outcomes(aligned.student_ids, aligned.student_joined, self.vocab, self.dtype, device)
        self.of_teacher = Outcomes(
            aligned.teacher_ids, aligned.teacher_joined, aligned.teacher_size, self.dtype, device
        )
        self.has_rest = self.of_student.others > 0 and self.of_teacher.others > 0
        self.top_k = self._top_k()
        self.teacher_buffers: Tensor | None = None
        if isinstance(self.signal, TopKSignal):
            self.tokens["top_k_mass"] = self.signal.log_probs.exp().sum(dim=1).to(self.dtype)

    def _top_k(self) -> int | None:
        """How many of the teacher's tokens are compared; None is all of them."""
        asked = self.settings.teacher_top_k
        if isinstance(self.signal, TopKSignal):
            known = self.signal.ids.shape[1]
            return known if asked is None else min(known, asked)
        return None if asked is None or asked >= self.of_teacher.vocab else asked

    def _constants(self) -> Constants | None:
        return None  # nothing of this is compiled

    def run(self) -> dict[str, Tensor]:
        """What is said about each token, by name."""
        for at in even_cuts(self.targets.shape[0], self.chunk):
            self.run_chunk(at)
        self.tokens["divergence"].mul_(self.squared)
        return self.tokens

    def _run_block(self, at: slice, z_student: Tensor, z_teacher: Tensor | None) -> None:
        r, settings, tokens = at.stop - at.start, self.settings, self.tokens
        if self.buffers is None:
            self.buffers = z_student.new_empty(2, self.block, self.vocab, dtype=self.dtype)
        p, scratch = self.buffers[:, :r]
        z, slope_of_cap = self.student.logits(z_student)
        eager.shift_(z)
        student = eager.distributions(z, self.targets[at], settings.loss_temperature, p, scratch)
        tokens["student_entropy"][at] = student.entropy
        if self.ce_weights is not None:
            tokens["cross_entropy"][at] = -student.chosen
        teacher = None if z_teacher is None else self._of_teacher(at, z_teacher)
        if self.top_k is None:
            assert teacher is not None
            gradient = self._over_all_common(at, student, teacher, scratch)
        else:
            gradient = self._over_top_k(at, student, teacher, scratch)
        if self.gradients.any:
            self._finish_gradient(gradient, at, student, slope_of_cap)
            z_student.copy_(gradient)

    def _of_teacher(self, at: slice, z_teacher: Tensor) -> eager.Distributions:
        assert self.teacher is not None
        if self.teacher_buffers is None:
            self.teacher_buffers = z_teacher.new_empty(2, self.block, z_teacher.shape[1], dtype=self.dtype)
        q, scratch = self.teacher_buffers[:, : at.stop - at.start]
        zt = self.teacher.logits(z_teacher)[0]
        eager.shift_(zt)
        teacher = eager.distributions(zt, self.own[at], self.settings.teacher_temperature, q, scratch)
        self.tokens["teacher_entropy"][at] = teacher.entropy
        self.tokens["teacher_log_prob"][at] = teacher.chosen
        return teacher

    # ------------------------------------------------------------------------------------- over all common tokens

    def _over_all_common(
        self, at: slice, student: eager.Distributions, teacher: eager.Distributions, scratch: Tensor
    ) -> Tensor:
        """Fill in what is said about the block; the gradient [R, V] with respect to the student's z / T."""
        settings, tokens = self.settings, self.tokens
        common = self.of_student.common(student), self.of_teacher.common(teacher)
        most = student.log_p.amax(dim=-1, keepdim=True) + teacher.log_p.amax(dim=-1, keepdim=True)
        tokens["agreement"][at] = (common[0] + common[1]).eq(most).any(dim=-1).to(self.dtype)
        a, of_a = self.of_student.take(student, common[0], self.has_rest)
        b, of_b = self.of_teacher.take(teacher, common[1], self.has_rest)
        if settings.report_kls:
            tokens["forward_kl"][at], tokens["reverse_kl"][at] = eager.both_kls(a, b, of_a, of_b)
        tokens["divergence"][at], slope = settings.divergence.value_and_slope(a, b, of_a, of_b)
        return self._spread(slope, of_a, student.p, scratch) if self.gradients.any else slope

    def _spread(self, slope: Tensor, of_a: Tensor, p: Tensor, out: Tensor) -> Tensor:
        """The gradient [R, V] with respect to the student's z / T, of phi_a by outcome [R, S + 1].

        The rest's part goes to its tokens in proportion to their probability, p_v / p_rest.
        """
        if not self.has_rest:
            return self.of_student.spread_(out.zero_(), eager.softmax_gradient_(slope, of_a), p)
        size, total = slope.shape[1] - 1, slope.sum(dim=-1, keepdim=True)
        torch.mul(slope[:, size:] / of_a[:, size:], self.of_student.rest, out=out)
        return self.of_student.spread_(out.sub_(total).mul_(p), slope[:, :size], p)

    # ---------------------------------------------------------------------- over the teacher's most likely tokens

    def _over_top_k(
        self, at: slice, student: eager.Distributions, teacher: eager.Distributions | None, scratch: Tensor
    ) -> Tensor:
        """As `_over_all_common`; `teacher` is None where the signal is of its K most likely tokens."""
        settings, tokens, size = self.settings, self.tokens, self.of_student.ids.numel()
        ids, log_q, log_tail = self._most_likely(at, teacher)
        common = self.of_student.common(student)
        tokens["agreement"][at] = self._agreement(student, ids.gather(1, log_q.argmax(dim=1, keepdim=True)))
        tail = settings.top_k_tail if self._leaves_a_rest(ids.shape[1]) else None
        top, known = most_likely_outcomes(self.of_teacher.of(ids), log_q, log_tail, size, tail)
        outcomes = self.of_student.with_spares(student, common, ids.shape[1])
        value, gradient, *kls = eager.top_k_divergence(settings.divergence, outcomes, top, settings.report_kls)
        tokens["divergence"][at] = torch.where(known, value, 0)
        for name, kl in zip(("forward_kl", "reverse_kl"), kls, strict=False):
            tokens[name][at] = torch.where(known, kl, 0)
        gradient = torch.where(known[:, None], gradient, 0)
        return self.of_student.to_tokens(gradient, outcomes.p, student.p, scratch)

    def _most_likely(self, at: slice, teacher: eager.Distributions | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids and log-probabilities [R, K] of the teacher's most likely tokens, and of all others [R, 1]."""
        assert self.top_k is not None
        if teacher is not None:
            top = eager.top_k_of_dense(teacher.log_p, teacher.p, self.top_k, "bucket")
            return top.ids, top.log_q, top.log_tail
        assert isinstance(self.signal, TopKSignal)
        assert self.signal.own is not None
        ids, log_q = self.signal.ids[at], self.signal.log_probs[at].to(self.dtype)
        if self.top_k < ids.shape[1]:
            log_q, order = log_q.topk(self.top_k, dim=-1)
            ids = ids.gather(1, order)
        log_tail = None if self.top_k >= self.of_teacher.vocab else eager.log_mass_left(log_q)
        outcomes = log_q if log_tail is None else torch.cat([log_q, log_tail], dim=1)
        self.tokens["teacher_entropy"][at] = -(outcomes * outcomes.exp()).sum(dim=-1)
        self.tokens["teacher_log_prob"][at] = self.signal.own[at].to(self.dtype)
        return ids, log_q, log_tail

    def _leaves_a_rest(self, k: int) -> bool:
        """Whether there are other tokens on both sides beside the outcomes of the teacher's K."""
        of_student = self.of_student.others > 0 or k < self.of_student.ids.numel()
        return of_student and (self.of_teacher.others > 0 or k < self.of_teacher.vocab)

    def _agreement(self, student: eager.Distributions, top: Tensor) -> Tensor:
        """1.0 where the teacher's most likely token [R, 1] is common, and the student's."""
        size = self.of_student.ids.numel()
        if size == 0:
            return torch.zeros_like(student.entropy)
        column = self.of_teacher.common_of(top)
        said = student.log_p.gather(1, self.of_student.ids.take(column.clamp_max(size - 1)))
        return ((column < size) & said.eq(student.log_p.amax(dim=-1, keepdim=True)))[:, 0].to(self.dtype)
