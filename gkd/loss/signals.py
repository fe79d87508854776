"""What the teacher says about the N target tokens, and the output head that turns hidden states into logits.

Shapes: N target tokens, V vocabulary, D hidden size (Dt the teacher's), K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Head:
    """An output head: logits = softcap tanh(scale (h W^T + bias) / softcap), without the cap when it is None.

    Attributes:
        weight: [V, D]. bias: [V] or None.
        logit_scale: multiplies the logits before the cap (Cohere; for Granite 1 / logits_scaling).
        softcap: bound of the logits (Gemma-2 and later), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], all at once: for tests and for a few tokens."""
        out = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap


@dataclass(frozen=True, eq=False)
class DenseSignal:
    """The teacher in the same process: its last hidden states [N, Dt] at the targets, and its head.

    `exchanged` are pairs of ids whose logits change places before they are compared: where the teacher ends its turns
    with another token than the student, the one stands for the other.
    """

    hidden: Tensor
    head: Head
    exchanged: tuple[tuple[int, int], ...] = ()

    def exchanging(self, pair: tuple[int, int]) -> DenseSignal:
        """The same with two tokens in each other's place."""
        return replace(self, exchanged=(*self.exchanged, pair))


@dataclass(frozen=True, eq=False)
class TopKSignal:
    """The teacher's K most likely tokens per target: ids [N, K] and their log-probabilities [N, K] fp32.

    The log-probabilities are normalised over the full vocabulary at temperature 1, so 1 - sum(exp) is the tail's mass.
    """

    ids: Tensor
    log_probs: Tensor

    def exchanging(self, pair: tuple[int, int]) -> TopKSignal:
        """The same with two tokens in each other's place."""
        first, second = pair
        ids = torch.where(self.ids == first, second, torch.where(self.ids == second, first, self.ids))
        return replace(self, ids=ids)


TeacherSignal = DenseSignal | TopKSignal
