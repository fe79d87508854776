"""The loss and the step from their definitions, in float64. Nothing here is shared with the package or a peer.

Shapes: N targets, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Trained:
    """A sequence that was trained on: its ids, and how many of them are the prompt."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def completion(self) -> tuple[int, ...]:
        return self.ids[self.prompt_length :]


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Generalized Jensen-Shannon divergence [N] of log-probabilities [N, V] (GKD, arXiv 2306.13649, Eq. 1).

    beta = 0 is KL(teacher || student), beta = 1 is KL(student || teacher).
    """
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    weight = torch.tensor(beta, dtype=student.dtype)
    mixture = torch.logaddexp(teacher + weight.log(), student + (1 - weight).log())
    return weight * _kl(teacher, mixture) + (1 - weight) * _kl(student, mixture)


def _kl(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x.exp() > 0, x.exp() * (x - y), 0.0).sum(-1)


def mean_loss(student: nn.Module, teacher: nn.Module, rows: list[Trained], beta: float) -> Tensor:
    """The mean over all targets of a step: the tokens behind each prompt, each at the place that predicts it."""
    total, number = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row.ids])
        places = slice(row.prompt_length - 1, len(row.ids) - 1)
        ours = student(input_ids=ids).logits[0, places]
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits[0, places]
        shared = min(ours.shape[-1], theirs.shape[-1])  # rows behind the vocabulary are no tokens
        total = total + jsd(ours[:, :shared].log_softmax(-1), theirs[:, :shared].log_softmax(-1), beta).sum()
        number += len(row.completion)
    return total / number


def step(student: nn.Module, teacher: nn.Module, rows: list[Trained], beta: float) -> Tensor:
    """How one step of plain SGD at learning rate 1 changes the student's parameters, as one vector."""
    exact, other = (copy.deepcopy(model).double().eval() for model in (student, teacher))
    parameters = list(exact.parameters())
    gradients: tuple[Any, ...] = torch.autograd.grad(
        mean_loss(exact, other, rows, beta), parameters, allow_unused=True
    )
    return torch.cat(
        [(torch.zeros_like(p) if g is None else -g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )
