"""The student's own side without a teacher, chunk by chunk: cross-entropy with its gradient, and what a target costs.

Shapes: N target tokens, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd.loss import eager
from gkd.loss.chunks import Gradients, default_chunk_size, even_cuts
from gkd.loss.projection import Projection
from gkd.loss.settings import LossSettings


def run_cross_entropy(
    student: Projection, targets: Tensor, weights: Tensor, settings: LossSettings, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """Entropy [N] and cross-entropy [N] of the student; `gradients` take in that of sum_n weights[n] CE_n."""
    n, vocab, dtype = targets.shape[0], student.weight.shape[0], student.dtype
    entropy, cross_entropy = torch.zeros(2, n, dtype=dtype, device=targets.device)
    default = default_chunk_size(vocab, dtype.itemsize, targets.device.type, gradients.weight is not None)
    chunk = max(1, min(settings.chunk_size or default, n))
    buffer = student.buffer(chunk)
    for at in even_cuts(n, chunk):
        z, slope_of_cap = student.logits(student.project(at, buffer))
        gradient = torch.empty_like(z)
        eager.log_softmax_(eager.shift_(z), gradient)
        own = targets[at, None]
        cross_entropy[at] = -z.gather(1, own)[:, 0]
        entropy[at] = -(z.mul_(gradient)).sum(dim=-1)
        gradient.scatter_add_(1, own, -torch.ones_like(own, dtype=dtype))
        if slope_of_cap is not None:
            gradient.mul_(slope_of_cap)
        gradients.add(student, at, gradient, weights[at, None] * student.logit_scale)
    return entropy, cross_entropy


def log_probs(model: Projection, targets: Tensor, settings: LossSettings) -> Tensor:
    """Log-probability [N] of each target at temperature 1, without a gradient: one matrix product."""
    n, vocab = targets.shape[0], model.weight.shape[0]
    found = torch.zeros(n, dtype=model.dtype, device=targets.device)
    default = default_chunk_size(vocab, model.dtype.itemsize, targets.device.type, False)
    chunk = max(1, min(settings.chunk_size or default, n))
    buffer = model.buffer(chunk)
    for at in even_cuts(n, chunk):
        z = eager.shift_(model.logits(model.project(at, buffer))[0])
        chosen = z.gather(1, targets[at, None])[:, 0]
        found[at] = chosen - z.exp_().sum(dim=-1).log_()
    return found
