"""Whether student and teacher think of the same tokens: the overlap of their most likely ones, on a few targets.

Shapes: N target tokens, n of them looked at, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal, Head, TeacherSignal

LOOKED_AT = 64  # targets of a micro-batch: a share below one in a hundred of the loss's work in a usual one


@torch.no_grad()
def top_k_overlap(student_hidden: Tensor, head: Head, signal: TeacherSignal, settings: LossSettings, k: int) -> Tensor:
    """|top K of the student and of the teacher| / K on targets that stand evenly among all (Rethinking OPD, arXiv
    2604.13016, which finds that it rises where on-policy distillation goes well).

    Args:
        student_hidden: [N, Ds]. head: the student's. signal: the teacher's; of K most likely tokens, they are its own.
        settings: its `shared_vocab`. k: K, cut to what there is to compare.

    Returns:
        [N], NaN on the targets that were not looked at.
    """
    n = student_hidden.shape[0]
    out = torch.full((n,), torch.nan, device=student_hidden.device)
    if n == 0:
        return out
    at = torch.linspace(0, n - 1, min(n, LOOKED_AT), device=student_hidden.device).round().long()
    few = signal.at(at)
    vocab = settings.shared_vocab or head.weight.shape[0]
    own = _most_likely(student_hidden.index_select(0, at), head, vocab, k)
    if isinstance(few, DenseSignal):
        theirs = _most_likely(few.hidden, few.head, settings.shared_vocab or few.head.weight.shape[0], k)
        for first, second in few.exchanged:
            theirs = torch.where(theirs == first, second, torch.where(theirs == second, first, theirs))
    else:
        theirs = few.ids.gather(1, few.log_probs.topk(min(k, few.ids.shape[1]), dim=1).indices)
        own = own[:, : theirs.shape[1]]
    shared = (own[:, :, None] == theirs[:, None, :]).any(dim=2).float().mean(dim=1)
    return out.index_copy_(0, at, shared)


def _most_likely(hidden: Tensor, head: Head, vocab: int, k: int) -> Tensor:
    """[n, K] ids, most likely first."""
    logits = head.logits(hidden.to(head.weight.dtype))[:, :vocab]
    return logits.topk(min(k, vocab), dim=1).indices
