"""What a trainer trained on and how its weights moved, seen from outside: from the forward passes of its student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conformance.definition import Trained
from conformance.material import Run


@dataclass
class Seen:
    """Attributes:
    sequences: the ids of every row of every training pass, without padding.
    change: how the parameters moved, as one vector. before: the student's weights before.
    """

    sequences: list[tuple[int, ...]]
    change: Tensor
    after: Tensor


@contextmanager
def training_passes(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The rows that pass the student's backbone while gradients are recorded."""
    seen: list[tuple[int, ...]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        seen.extend(tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True))

    hook = model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def train(adapter: Any, run: Run) -> Seen:
    """Train, and see."""
    trainer = adapter.trainer(run)
    parameters = list(run.student.parameters())
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    with training_passes(run.student) as sequences:
        trainer.train(resume_from_checkpoint=run.resume)
    after = torch.cat([p.detach().flatten() for p in parameters]).cpu()
    return Seen(sequences, after - before, after)


def rows_of(seen: Seen, run: Run) -> tuple[list[Trained], str]:
    """The sequences with the prompts that they begin with; and what is wrong with them, or "".

    Everything behind the first stop token is left out: nothing there may be trained on.
    """
    prompts = sorted((tuple(prompt) for prompt in run.prompts()), key=len, reverse=True)
    found, wrong = [], ""
    for ids in seen.sequences:
        prompt = next((p for p in prompts if ids[: len(p)] == p), None)
        if prompt is None:
            wrong = "a sequence does not begin with its prompt"
            continue
        found.append(Trained(ids, len(prompt)))
    return found, wrong
