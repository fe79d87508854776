"""A training whose teacher reads another prompt than the student, against two dense forward passes in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model
from training import Remember, logged, losses, trainer_of
from transformers import TrainerCallback
from views import dense_loss, gradient, relative, teacher_prompt, viewed_rows

from gkd.loss.registry import DIVERGENCES, make_divergence

ROWS = viewed_rows(20)
ENDS = (258, 256)  # <|im_end|> ends the student's turns, <|endoftext|> the teacher's


class Gradients(TrainerCallback):
    """The gradient of each step, before it is taken."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))


def trained(tmp_path, monkeypatch, rows=ROWS, end_map=None, **values):
    """One step over all rows: the trainer, its gradient, and the window as it was trained on."""
    memory, gradients = Remember(monkeypatch), Gradients()
    values = {"per_device_train_batch_size": 20, "learning_rate": 0.0, "teacher_cache_dir": "off", **values}
    trainer = trainer_of(tmp_path, Dataset.from_list(rows), callbacks=[gradients], **values)
    if end_map is not None:
        trainer.hygiene = replace(trainer.hygiene, end_map=end_map)
        trainer.data_collator = replace(trainer.data_collator, end_map=end_map)
    trainer.train()
    return trainer, gradients.steps[0], memory.windows[0]


def check(trainer, found, window, rows=ROWS, name="jsd", end_map=None):
    student, teacher = tiny_model(seed=1).double(), tiny_model(hidden=48, layers=3, seed=2).double()
    wanted = dense_loss(student, teacher, window, rows, name, end_map)
    assert losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-5)  # the log rounds
    assert relative(found, gradient(wanted, student)) < 1e-6


def test_a(tmp_path, monkeypatch):
    for name in DIVERGENCES:
        trainer, found, window = trained(tmp_path, monkeypatch, divergence=name, lmbda=0.5)
        student, teacher = tiny_model(seed=1).double(), tiny_model(hidden=48, layers=3, seed=2).double()
        wanted = dense_loss(student, teacher, window, ROWS, name)
        print(name, losses(trainer)[0], wanted.item(), relative(found, gradient(wanted, student)))
