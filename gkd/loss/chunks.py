"""One call of the fused divergence at work: projections, chunks, blocks, and the gradients they add up to.

Shapes: N target tokens, V vocabulary, D hidden size, K top-k, C tokens of a chunk, R tokens of a block of it.

A chunk is what the matrix products see; on a CPU the elementwise work then goes through it in blocks small enough for
the cache. What is scalar per token (its weight, 1 / temperature, the logit scale) is applied to the [C, D] product
rather than to [C, V]: cheaper, and the [C, V] gradient keeps the scale of probabilities, which fp16 can hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gkd.loss import eager
from gkd.loss.compiled import CannotCompileError, Constants, can_compile, compiled_chunk
from gkd.loss.projection import Projection, add_product
from gkd.loss.settings import FusedOutput, LossSettings
from gkd.loss.signals import DenseSignal, TeacherSignal, TopKSignal

# Bytes of the two [C, V] logit buffers that decide the default chunk. A chunk reads both heads once and, with a
# trained head, writes the head's gradient once, so a trained head wants more tokens per chunk.
_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
# Bytes of one [R, V] buffer of a block on a CPU: a handful of them should stay in the cache.
_BLOCK_BYTES = 5 * 2**19


def default_chunk_size(vocab: int, itemsize: int, device: str, trained_head: bool) -> int:
    """Tokens per chunk that the byte budget of a device ("cpu", "cuda", ...) allows."""
    budget = _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"]) * (2 if trained_head else 1)
    return max(1, budget // (2 * vocab * itemsize))


def even_cuts(count: int, most: int) -> Iterator[slice]:
    """Slices of at most `most` tokens that differ by one at most: no short rest, which would be compiled anew."""
    number = -(-count // most)
    for i in range(number):
        yield slice(i * count // number, (i + 1) * count // number)


@dataclass(eq=False)
class Gradients:
    """Gradients of the loss in fp32, filled chunk by chunk; None where nothing asks for one.

    Attributes:
        hidden: [N, Ds]. weight: [V, Ds]. bias: [V].
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, inputs: Iterable[Tensor | None], needs: Iterable[bool], dtype: torch.dtype) -> Gradients:
        return cls(
            *(
                torch.zeros_like(tensor, dtype=dtype) if tensor is not None and needed else None
                for tensor, needed in zip(inputs, needs, strict=True)
            )
        )

    @property
    def any(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def of_rows(self, count: int) -> Gradients:
        """The same head's, for `count` hidden states by themselves."""
        hidden = None if self.hidden is None else self.hidden.new_zeros(count, self.hidden.shape[1])
        return replace(self, hidden=hidden)

    def add(self, student: Projection, at: slice, gradient: Tensor, scale: Tensor) -> None:
        """Take in a chunk: gradient [C, V] with respect to the raw logits, up to each token's factor scale [C, 1]."""
        vocab = student.weight.shape[0]
        lowered = gradient.to(student.hidden.dtype)
        if self.hidden is not None:
            torch.mul(student.back(lowered), scale, out=self.hidden[at])
        if self.weight is not None:
            add_product(self.weight[:vocab], lowered.t(), student.hidden[at], scale)
        if self.bias is not None:
            self.bias[:vocab].addmv_(gradient.to(self.bias.dtype).t(), scale[:, 0])


class FusedPass:
    """One call of `fused_divergence`: the buffers, the gradients and the per-token results it fills chunk by chunk."""

    def __init__(
        self,
        student: Projection,
        teacher: Projection | None,
        *,
        signal: TeacherSignal,
        targets: Tensor,
        weights: Tensor,
        ce_weights: Tensor | None,
        settings: LossSettings,
        gradients: Gradients,
    ) -> None:
        self.student, self.teacher, self.signal = student, teacher, signal
        self.targets, self.settings, self.gradients = targets, settings, gradients
        self.dtype, self.vocab, device = student.dtype, student.weight.shape[0], targets.device
        n = targets.shape[0]
        names = ["divergence", "student_entropy", "teacher_entropy", "agreement", "teacher_log_prob"]
        names += ["cross_entropy"] * (ce_weights is not None) + ["forward_kl", "reverse_kl"] * settings.report_kls
        self.tokens = {name: torch.zeros(n, dtype=self.dtype, device=device) for name in names}

        self.squared = settings.loss_temperature**2 if settings.scale_by_temperature_squared else 1.0
        self.weights = weights.to(self.dtype)
        self.ce_weights = None if ce_weights is None else ce_weights.to(self.dtype)
        # A token's gradient has one factor for the [C, D] products, and with CE two shares of at most 1 for [C, V].
        self.scale = self.weights * (self.squared / settings.loss_temperature)
        if self.ce_weights is not None:
            of_divergence = self.scale
            self.scale = torch.maximum(of_divergence.abs(), self.ce_weights.abs())
            safe = self.scale.clamp_min(torch.finfo(self.dtype).tiny)
            self.divergence_share, self.ce_share = of_divergence / safe, self.ce_weights / safe

        widest = self.vocab if teacher is None else max(self.vocab, teacher.weight.shape[0])
        default = default_chunk_size(widest, self.dtype.itemsize, device.type, gradients.weight is not None)
        self.chunk = max(1, min(settings.chunk_size or default, n))
        # Only a CPU gains from small blocks; an accelerator wants few large kernels.
        block = _BLOCK_BYTES // (widest * self.dtype.itemsize) if device.type == "cpu" else self.chunk
        self.block = max(1, min(block, self.chunk))
        self.z_student = student.buffer(self.chunk)
        self.z_teacher = None if teacher is None else teacher.buffer(self.chunk)
        self.constants = self._constants() if can_compile(settings, device, self.vocab) else None
        self.buffers: Tensor | None = None  # of the eager path, made when they are needed

    def _constants(self) -> Constants | None:
        """What is compiled in; None for a teacher without logits."""
        if self.teacher is None:
            return None
        settings, student, teacher = self.settings, self.student, self.teacher
        return Constants(
            settings.divergence,
            settings.loss_temperature,
            settings.teacher_temperature,
            student.logit_scale,
            student.softcap,
            teacher.logit_scale,
            teacher.softcap,
            gradient=self.gradients.any,
            cross_entropy=self.ce_weights is not None,
            kls=settings.report_kls,
        )

    def run_chunk(self, at: slice) -> None:
        n = at.stop - at.start
        z_student = self.student.project(at, self.z_student)
        z_teacher = None if self.teacher is None else self._project_teacher(at)
        gradient = self._run_compiled(at, z_student, z_teacher)
        if gradient is None:
            for start in range(0, n, self.block):
                stop = min(start + self.block, n)
                here = slice(at.start + start, at.start + stop)
                self._run_block(here, z_student[start:stop], None if z_teacher is None else z_teacher[start:stop])
            gradient = z_student
        if self.gradients.any:
            scale = self.scale[at, None] * self.student.logit_scale
            self.gradients.add(self.student, at, gradient, scale)

    def _project_teacher(self, at: slice) -> Tensor:
        """The teacher's products h W^T, with the columns of exchanged tokens in each other's place."""
        assert self.teacher is not None
        assert isinstance(self.signal, DenseSignal)
        z = self.teacher.project(at, self.z_teacher)
        for first, second in self.signal.exchanged:
            kept = z[:, first].clone()
            z[:, first] = z[:, second]
            z[:, second] = kept
        return z

    def _run_compiled(self, at: slice, z_student: Tensor, z_teacher: Tensor | None) -> Tensor | None:
        """The gradient (or, where none is asked for, the logits); None where the eager path has to do it."""
        # One token is a case of its own to the compiler, which would take seconds for it.
        if self.constants is None or at.stop - at.start == 1:
            return None
        shares = (None, None) if self.ce_weights is None else (self.divergence_share[at], self.ce_share[at])
        run = compiled_chunk(self.constants, optional=self.settings.compiled is None)
        try:
            gradient, tokens = run(z_student, z_teacher, self.targets[at], *shares)
        except CannotCompileError:
            self.constants = None
            return None
        for name, values in tokens.items():
            self.tokens[name][at] = values
        return z_student if gradient is None else gradient

    def _run_block(self, at: slice, z_student: Tensor, z_teacher: Tensor | None) -> None:
        r, targets, settings = at.stop - at.start, self.targets[at], self.settings
        if self.buffers is None:
            self.buffers = torch.empty(3, self.block, self.vocab, dtype=self.dtype, device=targets.device)
        p, q, scratch = self.buffers[:, :r]
        z, slope_of_cap = self.student.logits(z_student)
        eager.shift_(z)
        teacher, top = None, None
        if self.teacher is not None:
            assert z_teacher is not None
            zt = eager.shift_(self.teacher.logits(z_teacher)[0])
            self.tokens["agreement"][at] = eager.same_top(z, zt, scratch)
            teacher = eager.distributions(zt, targets, settings.teacher_temperature, q, scratch)
            self.tokens["teacher_entropy"][at] = teacher.entropy
            self.tokens["teacher_log_prob"][at] = teacher.chosen
            if settings.teacher_top_k is not None and settings.teacher_top_k < self.vocab:
                top = eager.top_k_of_dense(teacher.log_p, q, settings.teacher_top_k, settings.top_k_tail)
        else:
            top = self._top_k_signal(at, z)
        student = eager.distributions(z, targets, settings.loss_temperature, p, scratch)
        self.tokens["student_entropy"][at] = student.entropy
        if self.ce_weights is not None:
            self.tokens["cross_entropy"][at] = -student.chosen
        if top is not None:
            value, gradient, *kls = eager.top_k_divergence(settings.divergence, student, top, settings.report_kls)
        else:
            assert teacher is not None
            kls = list(eager.both_kls(student.log_p, teacher.log_p, p, q)) if settings.report_kls else []
            value, slope = settings.divergence.value_and_slope(student.log_p, teacher.log_p, p, q)
            gradient = eager.softmax_gradient_(slope, p) if self.gradients.any else slope
        self.tokens["divergence"][at] = value
        for name, kl in zip(("forward_kl", "reverse_kl"), kls, strict=False):
            self.tokens[name][at] = kl
        if self.gradients.any:
            self._finish_gradient(gradient, at, student, slope_of_cap)
            if gradient.data_ptr() != z_student.data_ptr():
                z_student.copy_(gradient)

    def _finish_gradient(
        self, gradient: Tensor, at: slice, student: eager.Distributions, slope_of_cap: Tensor | None
    ) -> None:
        if self.ce_weights is not None:
            share = self.ce_share[at, None]
            gradient.mul_(self.divergence_share[at, None]).addcmul_(student.p_at_one, share)
            gradient.scatter_add_(1, self.targets[at, None], -share)
        if slope_of_cap is not None:
            gradient.mul_(slope_of_cap)

    def _top_k_signal(self, at: slice, shifted: Tensor) -> eager.TopK:
        assert isinstance(self.signal, TopKSignal)
        ids, log_q, targets = self.signal.ids[at], self.signal.log_probs[at].to(self.dtype), self.targets[at]
        k = self.settings.teacher_top_k
        if k is not None and k < ids.shape[1]:
            log_q, order = log_q.topk(k, dim=-1)
            ids = ids.gather(1, order)
        exact = eager.top_k_of_signal(ids, log_q, self.vocab, "bucket")
        outcomes = log_q if exact.log_tail is None else torch.cat([log_q, exact.log_tail], dim=1)
        self.tokens["teacher_entropy"][at] = -(outcomes * outcomes.exp()).sum(dim=-1)
        hit = ids == targets[:, None]
        found = torch.where(hit, log_q, 0).sum(dim=-1)
        outside = found if exact.log_tail is None else exact.log_tail[:, 0]
        self.tokens["teacher_log_prob"][at] = torch.where(hit.any(dim=-1), found, outside)
        top = ids.gather(1, log_q.argmax(dim=-1, keepdim=True))
        self.tokens["agreement"][at] = shifted.gather(1, top)[:, 0].eq(0).to(self.dtype)
        tail = self.settings.top_k_tail
        return exact if tail == "bucket" else eager.top_k_of_signal(ids, log_q, self.vocab, tail)

    def output(self) -> FusedOutput:
        tokens: dict[str, Any] = dict(self.tokens)
        tokens["divergence"].mul_(self.squared)
        loss = (self.weights * tokens["divergence"]).sum()
        if self.ce_weights is not None:
            loss = loss + (self.ce_weights * tokens["cross_entropy"]).sum()
        for name in ("cross_entropy", "forward_kl", "reverse_kl"):
            tokens.setdefault(name, None)
        return FusedOutput(loss=loss, **tokens)
