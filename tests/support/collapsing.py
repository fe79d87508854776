"""Tiny runs whose rollouts collapse: a teacher that never stops, or at once; a learning rate that is too high."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tiny import tiny_model, tiny_rows
from torch import nn
from training import trainer_of

STOP = 258
TEACHERS = {"never stops": -30.0, "stops at once": 30.0, "sound": 5.0}
CASES: dict[str, dict[str, Any]] = {
    "never stops": {"teacher": "never stops", "learning_rate": 1.4e-2},
    "stops at once": {"teacher": "stops at once", "learning_rate": 5e-4},
    "learning rate": {  # 20 times one that trains well
        "teacher": "sound",
        "learning_rate": 0.5,
        "student_seed": 7,
        "max_grad_norm": 0.0,
        "max_new_tokens": 48,
    },
}
DEFAULTS: dict[str, Any] = {
    "max_steps": 12,
    "per_device_train_batch_size": 16,
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "lmbda": 1.0,
    "max_new_tokens": 40,
    "temperature": 1.0,
}


def stopping(seed: int, bias: float) -> Any:
    """A model that stops about as often as the bias of the stop token says."""
    model = tiny_model(seed=seed)
    old = model.lm_head
    head = nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        head.bias.zero_()
        head.bias[STOP] = bias
    model.lm_head = head
    return model


def collapsing(folder: Any, case: str, **values: Any) -> Any:
    """A trainer of one of CASES; its rows have answers that end and are not empty."""
    own = {**CASES[case], **values}
    teacher, seed = TEACHERS[own.pop("teacher")], own.pop("student_seed", 1)
    if own.get("collapse_guard") in ("rollback", "stop"):
        own = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, **own}
    rows = Dataset.from_list(tiny_rows(32))
    models = {"student": stopping(seed, 5.0), "teacher": stopping(1, teacher)}
    return trainer_of(folder, rows, **models, **{**DEFAULTS, **own})
