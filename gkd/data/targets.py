"""Target tokens: which positions of a padded batch are trained on, and the weight of each.

B rows, T tokens, N targets, D hidden size. A target is a position whose next token is trained on:
`labels[:, 1:] != IGNORE`. Masks come from lengths, never from ids, so pad == eos changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd.data.sources import SOURCES

IGNORE = -100


def target_mask(labels: Tensor) -> Tensor:
    """[B, T] labels -> [B, T - 1] bool: position t is a target when token t + 1 is trained on."""
    return labels[:, 1:] != IGNORE


@dataclass(frozen=True)
class Targets:
    """Where the N targets of a padded batch are; int64, in row-major order.

    `collate` knows them on the CPU and sends them along. Looking for them on an accelerator (a boolean mask) would
    make the CPU wait for it, each time.

    Attributes:
        at: [N] position in the flattened [B * T] batch, whose hidden state predicts the target.
        ids: [N] the token to predict.
        rows: [N] row of the batch.
        places: [N] which target of its row it is, counted from 1.
    """

    at: Tensor
    ids: Tensor
    rows: Tensor
    places: Tensor


def find_targets(labels: Tensor) -> Targets:
    """The targets of [B, T] labels. Waits for the device that they are on."""
    mask = target_mask(labels)
    rows, positions = mask.nonzero(as_tuple=True)
    return Targets(rows * labels.shape[1] + positions, labels[:, 1:][mask], rows, mask.cumsum(dim=1)[mask])


def targets_of(batch: Mapping[str, Tensor]) -> Targets:
    """The targets that `collate` has put into a batch, or those of the labels where it has not made the batch."""
    if "target_at" not in batch:
        return find_targets(batch["labels"])
    return Targets(*(batch[f"target_{name}"] for name in ("at", "ids", "rows", "places")))


def select_targets(hidden: Tensor, targets: Targets) -> Tensor:
    """[B, T, D] hidden states -> [N, D]: those that predict a target."""
    return hidden.flatten(0, 1).index_select(0, targets.at.to(hidden.device))


def sequence_weights(labels: Tensor, targets: Targets) -> Tensor:
    """[B, T] labels -> [N]: 1 / (targets of the row), so that a row's targets sum to one (GKD paper, Eq. 2)."""
    return per_target(1.0 / target_mask(labels).sum(dim=1).clamp(min=1), targets)


def per_target(values: Tensor, targets: Targets) -> Tensor:
    """[B] per-row values -> [N] per-target values."""
    return values.index_select(0, targets.rows)


def target_weights(
    labels: Tensor,
    targets: Targets,
    sources: Tensor,
    num_items: Tensor | int | None,
    *,
    reduction: str = "token",
    ce_weight: float = 0.0,
    ce_on_student_tokens: bool = False,
    nll_on_teacher_tokens: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What each target counts in loss = sum_n weights[n] D_n + ce_weights[n] CE_n.

    Args:
        labels: [B, T]. targets: of these labels.
        sources: [B], indices into SOURCES.
        num_items: targets (or sequences, reduction="sequence") of the whole step; None = of these labels.
        reduction: "token" (every target counts alike) or "sequence" (every sequence counts alike; GKD Eq. 2).
        ce_weight: w of (1 - w) D + w CE; the cross-entropy is left out on tokens that the student wrote, unless
            `ce_on_student_tokens`.
        nll_on_teacher_tokens: w = 1 on tokens that the teacher wrote: their negative log-likelihood alone (Kim &
            Rush, arXiv 1606.07947, section 3.2).

    Returns:
        weights [N] of the divergence and of the cross-entropy (None when no token has any), fp32.
    """
    mask = target_mask(labels)
    if reduction == "sequence":
        weights, own = sequence_weights(labels, targets), mask.any(dim=1).sum()
    else:
        weights, own = torch.ones(targets.at.shape[0], device=labels.device), mask.sum()
    weights = weights / (own.clamp(min=1) if num_items is None else num_items)
    if ce_weight == 0 and not nll_on_teacher_tokens:
        return weights, None
    written_by = per_target(sources, targets)
    shares = torch.full_like(weights, ce_weight)
    if nll_on_teacher_tokens:
        shares = torch.where(written_by == SOURCES.index("teacher"), 1.0, shares)
    given = torch.ones_like(weights, dtype=torch.bool)
    if not ce_on_student_tokens:
        given = written_by != SOURCES.index("student")
    return weights * (1 - shares), weights * shares * given
