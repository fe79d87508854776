"""CONTRIBUTING's words for a new teacher and a new rollout backend: one file and one line, and a training runs."""

import sys
from dataclasses import dataclass

import pytest
import training
from training import config, losses, trainer_of

from gkd.assembly.teacher import TEACHERS
from gkd.config.fields import GKDConfig
from gkd.rollouts.base import BACKENDS

BACKEND = '''
from gkd.rollouts.base import Rollout


class Echo(Rollout):
    """Writes the prompt once more."""

    def generate(self, prompts, step, rows=None, teachers=None):
        self._check_prompts(prompts, step, self._numbered(prompts, rows))
        return [prompt[: self.settings.max_new_tokens] for prompt in prompts]
'''

TEACHER = '''
import torch

from gkd.data.targets import targets_of
from gkd.loss.signals import TopKSignal
from gkd.teachers.base import Teacher


class Sure(Teacher):
    """Is as good as certain of the token that stands there."""

    def score(self, batch):
        ids = targets_of(batch).ids
        return TopKSignal(ids[:, None], torch.full((len(ids), 1), -1e-4))
'''


@dataclass
class WithSure(GKDConfig):
    sure_teacher: bool = False


@pytest.fixture
def new_file(tmp_path, monkeypatch):
    """Write a module of the package's user."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_a_rollout_backend_is_one_file_and_one_line(tmp_path, new_file, monkeypatch):
    new_file("gkd_new_backend", BACKEND)
    monkeypatch.setitem(BACKENDS, "echo", "gkd_new_backend:Echo")  # the line
    trainer = trainer_of(tmp_path, rollout_backend="echo", lmbda=1.0)
    rollout, written = trainer.rollouts["student"], []
    original = rollout.generate
    rollout.generate = lambda prompts, *rest: written.append((prompts, original(prompts, *rest))) or written[-1][1]
    trainer.train()
    ((prompts, completions),) = written
    assert completions == [prompt[:8] for prompt in prompts]
    assert trainer.ledger.sequences["student"] == 4
    assert rollout.age == 0
    assert losses(trainer)[0] > 0


def test_an_unknown_backend_is_refused_with_the_new_one_among_the_choices(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "echo", "gkd_new_backend:Echo")
    with pytest.raises(ValueError, match=r"rollout_backend='ecco' is unknown: use one of hf, vllm, echo"):
        config(tmp_path, rollout_backend="ecco")


def test_a_teacher_is_one_file_and_one_line(tmp_path, new_file, monkeypatch):
    new_file("gkd_new_teacher", TEACHER)

    def sure(order):
        from gkd_new_teacher import Sure

        return Sure()

    monkeypatch.setitem(TEACHERS, "sure_teacher", sure)  # the line
    monkeypatch.setattr(training, "GKDConfig", WithSure)  # with the field that asks for it
    trainer = trainer_of(tmp_path, sure_teacher=True, teacher_top_k=1, lmbda=0.0, beta=0.0)
    assert type(trainer.teacher).__name__ == "Sure"
    trainer.train()
    # The KL to who is certain of a token is the token's negative log-likelihood.
    assert losses(trainer)[0] > 1
    trainer.create_model_card()
