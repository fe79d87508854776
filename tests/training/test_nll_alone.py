"""seq_kd_loss="nll" with lmbda=0: no token has a divergence, and training does not ask the teacher for scores."""

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_rows
from training import change, losses, trainer_of

from gkd.config.fields import GKDConfig
from gkd.loss import make_divergence
from gkd.loss.fused import fused_cross_entropy
from gkd.loss.settings import LossSettings
from gkd.loss.signals import Head

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
