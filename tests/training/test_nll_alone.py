"""seq_kd_loss="nll" or ce_weight=1, with lmbda=0: no token has a divergence, and the teacher is not asked."""

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, change, config, losses, trainer_of

from gkd.config.fields import GKDConfig
from gkd.data.sequences import sequence_of
from gkd.loss import make_divergence
from gkd.loss.fused import fused_cross_entropy
from gkd.loss.settings import LossSettings
from gkd.loss.signals import Head
from gkd.training.trainer import GKDTrainer

N, V, D = 11, 23, 7
SETTINGS = {"lmbda": 0.0, "seq_kd": True, "seq_kd_loss": "nll", "per_device_eval_batch_size": 4}


def head_and_inputs(dtype=torch.float64, **options):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    head = Head(
        torch.randn(V, D, dtype=dtype, requires_grad=True), torch.randn(V, dtype=dtype, requires_grad=True), **options
    )
    return hidden, head, torch.randint(0, 19, (N,)), torch.rand(N, dtype=dtype)


@pytest.mark.parametrize("chunk", [1, 4, N, None])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.7}])
@pytest.mark.parametrize("shared", [None, 20])
def test_the_cross_entropy_is_its_definition(chunk, options, shared):
    hidden, head, targets, weights = head_and_inputs(**options)
    settings = LossSettings(make_divergence("jsd"), chunk_size=chunk, shared_vocab=shared)
    output = fused_cross_entropy(hidden, head, targets, weights, settings)
    logits = (hidden @ head.weight.t() + head.bias) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    log_p = logits[:, :shared].log_softmax(-1)
    expected = -(weights * log_p.gather(1, targets[:, None])[:, 0]).sum()
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.student_entropy, -(log_p.exp() * log_p).sum(-1).detach())
    leaves = (hidden, head.weight, head.bias)
    for ours, theirs in zip(
        torch.autograd.grad(output.loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert (output.divergence, output.teacher_entropy, output.agreement, output.teacher_log_prob) == (None,) * 4


def test_no_target_is_a_zero_that_reaches_every_parameter():
    hidden, head, targets, weights = head_and_inputs()
    settings = LossSettings(make_divergence("jsd"))
    loss = fused_cross_entropy(hidden[:0], head, targets[:0], weights[:0], settings).loss
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, head.weight, head.bias)))


def test_a_target_outside_the_vocabulary_is_refused():
    hidden, head, targets, weights = head_and_inputs()
    with pytest.raises(ValueError, match="a target is outside the 5 compared tokens"):
        fused_cross_entropy(hidden, head, targets, weights, LossSettings(make_divergence("jsd"), shared_vocab=5))


def counting(trainer):
    asked, score = [], trainer.teacher.score

    def counted(batch):
        asked.append(len(batch["input_ids"]))
        return score(batch)

    trainer.teacher.score = counted
    return asked


def test_training_does_not_ask_the_teacher_and_learns_the_same(tmp_path, monkeypatch):
    rows = Dataset.from_list(tiny_rows(4, seed=7))
    trainer = trainer_of(tmp_path / "a", eval_dataset=rows, log_completions=True, **SETTINGS)
    asked = counting(trainer)
    changed = change(trainer)
    assert asked == []
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert not [name for name in logs if name.startswith("teacher/") or name in ("loss/teacher", "student/agreement")]
    assert logs["student/cross_entropy/teacher"] == pytest.approx(logs["loss"], rel=1e-3)
    assert logs["ledger/targets/teacher"] > 0
    assert trainer.evaluate()["eval_loss"] > 0
    assert sum(asked) == 4, "an evaluation is on the data, and has a divergence"

    monkeypatch.setattr(GKDConfig, "trains_on_nll_alone", False)
    scored = trainer_of(tmp_path / "b", **SETTINGS)
    asked = counting(scored)
    expected = change(scored)
    assert sum(asked) == 4
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-7)
    assert losses(trainer)[0] == pytest.approx(losses(scored)[0], rel=1e-4)


@pytest.mark.parametrize("values", [{"lmbda": 0.5}, {"seq_kd_loss": "divergence"}])
def test_where_a_token_has_a_divergence_the_teacher_is_asked(tmp_path, values):
    trainer = trainer_of(tmp_path, teacher=tiny_model(seed=2), **(SETTINGS | values))
    asked = counting(trainer)
    trainer.train()
    assert sum(asked) == 4


# ------------------------------------------------------------------------------------- the data's answers alone

SFT = {"lmbda": 0.0, "ce_weight": 1.0}


def without_teacher(folder, **values):
    """A trainer of the answers alone, whose teacher is not named."""
    own = {name: values.pop(name) for name in ("model", "eval_dataset") if name in values}
    return GKDTrainer(
        model=own.get("model", tiny_model(seed=1)),
        args=config(folder, **(SFT | values)),
        train_dataset=Dataset.from_list(tiny_rows(16)),
        eval_dataset=own.get("eval_dataset"),
        processing_class=tiny_tokenizer(),
    )


def answers_nll(model, sequences):
    """Mean negative log-likelihood of the targets in float64, one sequence at a time."""
    total, number = torch.zeros((), dtype=torch.float64), 0
    for sequence in sequences:
        ids, labels = torch.tensor([sequence.input_ids]), torch.tensor(sequence.labels[1:])
        at = labels != -100
        log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)[at]
        total = total - log_p.gather(1, labels[at][:, None]).sum()
        number += int(at.sum())
    return total / number


def test_supervised_fine_tuning_without_a_teacher_is_its_definition(tmp_path, monkeypatch):
    rows = Dataset.from_list(tiny_rows(4, seed=7))
    trainer = without_teacher(tmp_path, eval_dataset=rows, per_device_eval_batch_size=3)
    model = tiny_model(seed=1)
    assert trainer.teacher_model is None
    held_out = [sequence_of(row) for row in trainer.eval_dataset]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(answers_nll(model, held_out).item(), rel=1e-5)
    seen = Remember(monkeypatch)
    changed = change(trainer)
    loss = answers_nll(model, seen.windows[0])
    expected = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(changed, expected, rtol=1e-3, atol=1e-6)
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-4)


def test_a_teacher_that_is_named_is_not_asked_and_serves_evaluations(tmp_path):
    rows = Dataset.from_list(tiny_rows(4, seed=7))
    trainer = trainer_of(tmp_path / "a", eval_dataset=rows, per_device_eval_batch_size=4, **SFT)
    asked = counting(trainer)
    changed = change(trainer)
    assert asked == []
    torch.testing.assert_close(changed, change(without_teacher(tmp_path / "b")), rtol=1e-4, atol=1e-7)
    trainer.evaluate()
    assert sum(asked) == 4


@pytest.mark.parametrize("values", [{"lmbda": 0.5}, {"ce_weight": 0.9}, {"seq_kd": True}])
def test_any_other_training_needs_a_teacher(tmp_path, values):
    with pytest.raises(ValueError, match="there is no teacher"):
        without_teacher(tmp_path, **values)
