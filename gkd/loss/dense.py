"""The generalized JSD on dense logits, for those who have them: the drop-in replacement of TRL's static method.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gkd.loss.divergences import check_beta


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Generalized JSD of dense logits, as `trl.experimental.gkd.GKDTrainer.generalized_jsd_loss` (TRL 1.16) means it.

    The same value for the same arguments, except that everything after the logits is done in fp32 (or fp64) whatever
    their dtype. The teacher's logits get no gradient. For training use `gkd.loss.fused`, which never builds the
    logits.

    Args:
        student_logits: [..., V]. teacher_logits: [..., V].
        labels: [...]; positions at -100 are left out. None = every position counts.
        beta: 0 = KL(teacher || student), 1 = KL(student || teacher), between: GKD Eq. 1.
        temperature: divides both logits; the result is not multiplied by its square.
        reduction: "batchmean" = sum over positions and vocabulary / number of labelled positions (without labels: /
            the size of the first dimension); "sum"; "mean" = over positions and vocabulary; "none" = the terms.
        num_items_in_batch: when given, the result is sum / num_items_in_batch, whatever `reduction` says.

    Returns:
        A scalar in nats, or with "none" the terms [..., V] (with labels: [labelled positions, V]).

    Raises:
        ValueError: beta outside [0, 1], temperature not above 0, an unknown reduction.
    """
    check_beta(beta)
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if reduction not in ("batchmean", "sum", "mean", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown: choose batchmean, sum, mean or none")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    if labels is not None:
        student_logits, teacher_logits = student_logits[labels != -100], teacher_logits[labels != -100]
    a = torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    b = torch.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=-1)
    if beta == 0:
        terms = b.exp() * (b - a)
    elif beta == 1:
        terms = a.exp() * (a - b)
    else:
        m = torch.logaddexp(a + math.log1p(-beta), b + math.log(beta))
        terms = beta * b.exp() * (b - m) + (1 - beta) * a.exp() * (a - m)
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(terms.device)
        return terms.sum() / num_items_in_batch
    if reduction == "batchmean":
        return terms.sum() / max(terms.shape[0], 1)
    if reduction == "sum":
        return terms.sum()
    return terms.mean() if reduction == "mean" else terms
