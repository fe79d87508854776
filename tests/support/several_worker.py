"""A training with teachers of several kinds, and a process that dies in the middle of it.

Started with a folder, that of the models and the server's address, it trains there and is killed at a step's end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from training import config
from transformers import TrainerCallback

from gkd.training.trainer import GKDTrainer

NAMES = ("dense", "offloaded", "served")
TOP_K = 20
STEPS, SAVED, KILLED = 6, 2, 3
RESUMED: dict[str, Any] = {
    "lmbda": 0.5,
    "seq_kd": True,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
}


def entries(models: Path, url: str) -> dict[str, dict[str, Any]]:
    return {
        "dense": {"model": str(models / "dense")},
        "offloaded": {"model": str(models / "offloaded"), "placement": "cpu_offload", "weight": 2.0},
        "served": {"server": url, "top_k": TOP_K},
    }


def rows_of(*names: str, n: int = 12) -> list[dict[str, Any]]:
    """Rows of several teachers in turn, without those of others."""
    every = [{**row, "teacher": NAMES[i % len(NAMES)]} for i, row in enumerate(tiny_rows(n))]
    return [row for row in every if row["teacher"] in names]


def trainer_on(folder: Path, rows: list[dict[str, Any]], student: Any = None, **values: Any) -> GKDTrainer:
    extra = {name: values.pop(name) for name in ("eval_dataset", "callbacks") if name in values}
    return GKDTrainer(
        student or tiny_model(seed=1),
        args=config(folder, **{"lmbda": 0.0, "max_length": 128, **values}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        **extra,
    )


class Die(TrainerCallback):
    """kill -9 from within: nothing is written, closed or told any more."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, models, url = sys.argv[1:]
    teachers = entries(Path(models), url)
    trainer_on(Path(folder), rows_of(*NAMES), teachers=teachers, callbacks=[Die()], **RESUMED).train()
