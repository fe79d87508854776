"""Law 6: the teacher has no gradient and no optimizer state, is in no checkpoint and never in training mode."""

import copy

import pytest
import torch
from fused_case import Case
from tiny import tiny_model
from training import trainer_of
from variants import logits

from gkd.loss.dense import generalized_jsd_loss
from gkd.loss.signals import DenseSignal, Head


def test_the_teacher_is_frozen(tmp_path):
    teacher = tiny_model(hidden=48, layers=3, seed=2).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_of(
        tmp_path, teacher=teacher, max_steps=2, seq_kd=True, optim="adamw_torch", save_strategy="steps", save_steps=2
    )
    trainer.train()
    assert not any(m.training for m in trainer.teacher_model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in trainer.teacher_model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher_model.state_dict().items())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in trainer.teacher_model.parameters()}
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(saved) <= set(trainer.model.state_dict())


def test_one_object_as_both_models_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="the same object"):
        trainer_of(tmp_path, student=model, teacher=model)


def test_teacher_and_statistics_carry_no_gradient():
    case = Case()
    teacher = DenseSignal(
        case.signal.hidden.requires_grad_(), Head(case.signal.head.weight.requires_grad_(), case.signal.head.bias)
    )
    case.signal = teacher
    output = case.fused(ce=True, report_kls=True)
    assert [name for name, value in vars(output).items() if value is not None and value.requires_grad] == ["loss"]
    output.loss.backward()
    assert teacher.hidden.grad is None
    assert teacher.head.weight.grad is None


def test_dense_loss_gives_the_teacher_no_gradient():
    student, teacher = logits(3, 5, seed=1).requires_grad_(), logits(3, 5, seed=2).requires_grad_()
    generalized_jsd_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
