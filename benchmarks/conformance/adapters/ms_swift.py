"""ms-swift's GKD loss."""

from __future__ import annotations

from typing import Any

from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

from conformance.adapters import Adapter
from conformance.loss_cases import LossCall
from conformance.result import Source

_SOURCES = {
    "never below 0 with a bf16 teacher": Source(
        "swift/rlhf_trainers/gkd_loss.py",
        "t_log = log_softmax_fn(t_logits[start:end])",
        "log-probabilities in the dtype of the logits: in bf16 they do not add up to 1",
    ),
}


class Swift(Adapter):
    name, package, sources = "ms-swift (loss)", "ms-swift", _SOURCES

    def loss(self, call: LossCall) -> Any:
        """As its trainer takes the mean (`GKDTrainer._compute_jsd_loss`)."""
        ours, theirs = call.logits()
        output = TeacherOutput(full_logits=theirs, labels=call.labels)
        total, number = gkd_loss(ours, output, call.labels, call.beta, call.temperature)
        return total * 0 if number == 0 else total / number


ADAPTER = Swift()
