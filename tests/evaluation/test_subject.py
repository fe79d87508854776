"""What is asked of a model under measurement, wherever it is."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from gkd.evaluation.harness import Evaluator
from gkd.evaluation.measures import METRICS, Estimate
from gkd.evaluation.subject import Conditions, LocalSubject, ServedSubject, subject_of
from gkd.loss.registry import make_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import TopKSignal
from gkd.rollouts.base import Rollout, SamplingSettings
from gkd.teachers.base import Teacher

PROMPTS = [[5, 6], [7]]
SAMPLING = SamplingSettings(max_new_tokens=2, stop_ids=(258,))


class Echo(Rollout):
    def generate(self, prompts, step, rows=None, teachers=None):
        return [prompt[-1:] for prompt in prompts]


class Elsewhere(Teacher):
    """Is sure of token 9 everywhere, and writes the last token again."""

    writes, remote, top_k = True, True, 1

    def score(self, batch):
        targets = int((batch["labels"][:, 1:] != -100).sum())
        return TopKSignal(torch.full((targets, 1), 9), torch.zeros(targets, 1))

    def rollout(self, settings, *, seed, source):
        return Echo(settings)

    def log_probs(self, sequences):
        return [[-0.5] * (len(ids) - start) for ids, start in sequences]


class Nowhere(Teacher):
    def score(self, batch):
        raise NotImplementedError


class Tasks:
    """Stands where lm-eval's tasks do."""

    def measure(self, model, tokenizer):
        assert not model.training
        return {"public/quiz": Estimate(0.5)}, {"public/quiz": METRICS["ended"]}


def test_a_teacher_is_measured_by_its_model_or_by_what_it_says_or_not_at_all():
    teacher = Nowhere()
    assert subject_of(teacher) is None
    teacher.model = tiny_model()
    assert subject_of(teacher) == LocalSubject(teacher.model) != LocalSubject(tiny_model())
    served = Elsewhere()
    assert subject_of(served) == ServedSubject(served) != ServedSubject(Elsewhere())
    assert subject_of(served).top_k == 1


def test_a_teacher_of_any_kind_that_writes_is_measured_without_a_model():
    """A new kind declares `writes`; the harness knows no class of teachers."""
    teacher, student = subject_of(Elsewhere()), LocalSubject(tiny_model())
    loss = LossSettings(make_divergence("forward_kl"))
    harness = Evaluator(teacher, tiny_tokenizer(), PROMPTS, [[1, 2, 3]], SAMPLING, loss, public_tasks=Tasks())
    of_student, of_teacher = harness.measure(student, "student"), harness.measure(teacher, "teacher")
    assert harness.teacher_text() == [[6], [7]]
    ids = torch.tensor([[5, 6, 6], [7, 7, 258]])
    log_probs = student.model(ids).logits.log_softmax(-1)
    expected = -(log_probs[0, 1, 9] + log_probs[1, 0, 9]) / 2  # KL of one certain outcome, at the target of each text
    assert of_student.values["divergence_teacher_text"].value == pytest.approx(expected.item(), rel=1e-4)
    assert of_teacher.values["divergence_own"].value == 0.0
    assert of_teacher.values["perplexity"].value == pytest.approx(2.718281828**0.5)


def test_public_tasks_are_run_on_models_in_this_process():
    student, teacher = LocalSubject(tiny_model().train()), subject_of(Elsewhere())
    loss = LossSettings(make_divergence("forward_kl"))
    harness = Evaluator(teacher, tiny_tokenizer(), PROMPTS, [], SAMPLING, loss, public_tasks=Tasks())
    found = harness.measure(student, "student")
    assert found.values["public/quiz"].value == 0.5
    assert "public/quiz" in found.extra
    assert student.model.training
    assert "public/quiz" not in harness.measure(teacher, "teacher").values
    assert teacher.public_tasks(Tasks(), tiny_tokenizer(), Conditions()) == ({}, {})
