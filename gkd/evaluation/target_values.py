"""What is measured at a single target: how far a model is from its teacher there, and whether both would say the same.

N targets.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gkd.evaluation.subject import Signal, Subject
from gkd.loss.divergences import forward_kl
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import AlignedSignal, DenseSignal

TARGET_VALUES = ("divergence", "forward_kl", "agreement")  # the KL at temperature 1
COUNTED = len(TARGET_VALUES)  # the column that says of how many targets the agreement is told


def loss_against(loss: LossSettings, teacher: Subject) -> LossSettings:
    """As trained, but against all that the teacher says."""
    plain = loss.loss_temperature == loss.teacher_temperature == 1
    return replace(loss, teacher_top_k=teacher.top_k, top_k_tail="bucket", report_kls=plain)


def target_values(
    own: DenseSignal,
    signal: Signal,
    targets: Tensor,
    *,
    loss: LossSettings,
    exchanged: tuple[int, int] | None = None,
) -> Tensor:
    """TARGET_VALUES of each target, and whether its agreement counts, [N, 4] on the CPU."""
    if exchanged is not None:
        signal = signal.exchanging(exchanged)
    no_loss = torch.zeros(len(targets), device=own.hidden.device)
    output = fused_divergence(own.hidden, own.head, signal, targets, no_loss, loss)
    # What an aligned signal says of single places is not all that is compared.
    kl = None if isinstance(signal, AlignedSignal) else output.forward_kl
    if kl is None:
        # The forward KL that runs are compared by is of the two models as they are, whatever the training softens:
        # at temperature 1 it comes with the divergence, else from a second look at the heads.
        plain = replace(
            loss,
            divergence=forward_kl(),
            loss_temperature=1.0,
            teacher_loss_temperature=None,
            scale_by_temperature_squared=False,
        )
        kl = fused_divergence(own.hidden, own.head, signal, targets, no_loss, plain).divergence
    counts = torch.ones_like(kl) if output.at_border is None else output.at_border.to(kl.dtype)
    values = (output.divergence, kl, output.agreement * counts, counts)
    return torch.stack([value.cpu().double() for value in values], dim=1)
