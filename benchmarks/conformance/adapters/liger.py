"""Liger's fused JSD, as its users call it for distillation alone: the hard loss switched off."""

from __future__ import annotations

from typing import Any

from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

from conformance.adapters import Adapter
from conformance.loss_cases import LossCall
from conformance.result import NotApplicable, Source

_SOURCES = {
    "a teacher's head with padding rows": Source(
        "liger_kernel/chunked_loss/fused_linear_distillation.py",
        "pad_tensor = torch.zeros(",
        "the student's missing logits become 0, which is not the logarithm of nothing: each takes part of its mass",
    ),
    "never below 0 with a bf16 teacher": Source(
        "liger_kernel/chunked_loss/jsd_loss.py",
        "teacher_log_probs = F.log_softmax(teacher_logits, dim=-1)",
        "log-probabilities in the dtype of the logits: in bf16 they do not add up to 1",
    ),
}


class Liger(Adapter):
    name, package, sources = "Liger (loss)", "liger-kernel", _SOURCES

    def loss(self, call: LossCall) -> Any:
        if call.student_head.shape[0] > call.teacher_head.shape[0]:
            raise NotApplicable("takes a larger teacher's head only")
        fused = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=call.beta, temperature=call.temperature, compiled=False
        )
        flat = call.labels.flatten()
        hidden, other = (x.reshape(flat.shape[0], -1) for x in (call.student_hidden, call.teacher_hidden))
        return fused(hidden, call.student_head, other, call.teacher_head, flat)


ADAPTER = Liger()
