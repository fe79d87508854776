"""Whether student and teacher think of the same tokens: the overlap of their most likely ones, on a few targets.

Shapes: N target tokens, n of them looked at, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd.loss.outcomes import Outcomes
from gkd.loss.settings import LossSettings
from gkd.loss.signals import AlignedSignal, DenseSignal, Head, TeacherSignal

LOOKED_AT = 64  # targets of a micro-batch: a share below one in a hundred of the loss's work in a usual one


@torch.no_grad()
def top_k_overlap(
    student_hidden: Tensor, head: Head, signal: TeacherSignal | AlignedSignal, settings: LossSettings, k: int
) -> Tensor:
    """|top K of the student and of the teacher| / K on targets that stand evenly among all (Rethinking OPD, arXiv
    2604.13016, which finds that it rises where on-policy distillation goes well).

    Args:
        student_hidden: [N, Ds]. head: the student's. signal: the teacher's; of K most likely tokens, they are its own.
            With another tokenizer both have a token where both spell it alike, and targets where the teacher stands
            are looked at.
        settings: its `shared_vocab`. k: K, cut to what there is to compare.

    Returns:
        [N], NaN on the targets that were not looked at.
    """
    device = student_hidden.device
    out = torch.full((student_hidden.shape[0],), torch.nan, device=device)
    aligned = signal if isinstance(signal, AlignedSignal) else None
    known = torch.arange(out.shape[0]) if aligned is None else (aligned.border >= 0).nonzero()[:, 0].cpu()
    if known.numel() == 0:
        return out
    places = known[torch.linspace(0, known.numel() - 1, min(known.numel(), LOOKED_AT)).round().long()]
    at = places.to(device, non_blocking=True)
    few = signal.at(at) if not isinstance(signal, AlignedSignal) else signal.teacher.at(signal.border[places])
    vocab = settings.shared_vocab or head.weight.shape[0]
    own = _most_likely(student_hidden.index_select(0, at), head, vocab, k)
    if isinstance(few, DenseSignal):
        theirs = _most_likely(few.hidden, few.head, settings.shared_vocab or few.head.weight.shape[0], k)
        for first, second in few.exchanged:
            theirs = torch.where(theirs == first, second, torch.where(theirs == second, first, theirs))
    else:
        theirs = few.ids.gather(1, few.log_probs.topk(min(k, few.ids.shape[1]), dim=1).indices)
        own = own[:, : theirs.shape[1]]
    if aligned is not None:
        own, theirs = _as_common(aligned, own, theirs, vocab)
    same = (own[:, :, None] == theirs[:, None, :]) & (own[:, :, None] >= 0)
    return out.index_copy_(0, at, same.any(dim=2).float().mean(dim=1))


def _as_common(aligned: AlignedSignal, own: Tensor, theirs: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Numbers of common tokens in the place of both models' ids; -1 for others."""
    size, found = aligned.student_ids.numel(), []
    for ids, of_side, rows in (
        (own, aligned.student_ids, vocab),
        (theirs, aligned.teacher_ids, aligned.teacher_size),
    ):
        numbers = Outcomes(of_side, None, rows, torch.float32, ids.device).common_of(ids)
        found.append(torch.where(numbers < size, numbers, -1))
    return found[0], found[1]


def _most_likely(hidden: Tensor, head: Head, vocab: int, k: int) -> Tensor:
    """[n, K] ids, most likely first."""
    logits = head.logits(hidden.to(head.weight.dtype))[:, :vocab]
    return logits.topk(min(k, vocab), dim=1).indices
