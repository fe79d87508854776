"""Helpers of the trainer's tests: a short run on tiny models, and the loss written from its definition."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tiny import tiny_model, tiny_rows, tiny_tokenizer

from gkd.config.fields import GKDConfig
from gkd.training.trainer import GKDTrainer


def config(folder: Any, **values: Any) -> GKDConfig:
    """One step of plain SGD: what changes in the weights is the gradient."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_new_tokens": 8,
        "max_length": 256,
        "seed": 5,
    }
    return GKDConfig(**{**defaults, **values})


def trainer_of(folder: Any, rows: Any = None, student: Any = None, teacher: Any = None, **values: Any) -> GKDTrainer:
    extra = {name: values.pop(name) for name in ("peft_config", "callbacks", "eval_dataset") if name in values}
    return GKDTrainer(
        model=student if student is not None else tiny_model(seed=1),
        teacher_model=teacher if teacher is not None else tiny_model(hidden=48, layers=3, seed=2),
        args=config(folder, **values),
        train_dataset=rows if rows is not None else Dataset.from_list(tiny_rows(16)),
        processing_class=tiny_tokenizer(),
        **extra,
    )


def change(trainer: GKDTrainer) -> torch.Tensor:
    """Train, and give the change of all trained weights as one vector (minus the gradient, for one SGD step)."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    trainer.train()
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])


def losses(trainer: GKDTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer: GKDTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def dense_loss(student: Any, teacher: Any, sequences: list[Any], beta: float = 0.5) -> torch.Tensor:
    """The generalized JSD in float64 from probabilities, one sequence at a time, mean over all targets (GKD Eq. 1).

    beta = 0 is KL(teacher||student), beta = 1 KL(student||teacher).
    """
    total, number = torch.zeros((), dtype=torch.float64), 0
    for sequence in sequences:
        ids = torch.tensor([sequence.input_ids])
        keep = torch.tensor(sequence.labels[1:]) != -100
        q = student(input_ids=ids).logits[0, :-1].double().softmax(-1)[keep]
        with torch.no_grad():
            p = teacher(input_ids=ids).logits[0, :-1].double().softmax(-1)[keep]
        m = beta * p + (1 - beta) * q  # beta = 0 and 1 are the limits of JSD / beta and JSD / (1 - beta)
        terms = {0: p * (p / q).log(), 1: q * (q / p).log()}
        terms[beta] = terms.get(beta, beta * p * (p / m).log() + (1 - beta) * q * (q / m).log())
        total = total + terms[beta].sum()
        number += int(keep.sum())
    return total / number


class Remember:
    """Records what `gkd.training.window.count` is given: all sequences of a window after the rollout."""

    def __init__(self, monkeypatch):
        from gkd.training import trainer as module

        self.windows, original = [], module.count

        def count(sequences):
            self.windows.append(list(sequences))
            return original(sequences)

        monkeypatch.setattr(module, "count", count)
