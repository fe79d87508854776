"""Law 2: each fused path equals the definition in float64, in value and gradient, or it raises.

Here for whole trainings and for the fused pass; top-k teachers, precisions and
compiled rows are in tests/loss/.
"""

import copy
import itertools

import pytest
import torch
from fused_case import Case, N
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from training import Remember, change, dense_loss, losses, trainer_of
from variants import ALL

from gkd.loss import DIVERGENCES


@pytest.mark.parametrize("chunk", [1, 7, N, N + 3, None])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_every_divergence_is_its_definition(chunk, temperature):
    for (name, parameters), ce in itertools.product(ALL, (False, True)):
        Case().check(name, parameters, ce=ce, loss_temperature=temperature, chunk_size=chunk, report_kls=ce)


def test_two_temperatures_and_their_square():
    for name, ce in itertools.product(DIVERGENCES, (False, True)):
        Case().check(
            name, loss_temperature=2.0, teacher_loss_temperature=0.8, scale_by_temperature_squared=True, ce=ce
        )


@pytest.mark.parametrize(("student", "teacher"), [(37, 41), (41, 37), (37, 37)])
@pytest.mark.parametrize("shared", [30, 37])
def test_shared_vocabulary_both_ways(student, teacher, shared):
    for name in DIVERGENCES:
        case = Case(vocab=student, teacher_vocab=teacher)
        case.targets.clamp_(max=shared - 1)
        case.check(name, shared_vocab=shared, ce=True, chunk_size=5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_soft_cap_and_logit_scale(scale, softcap, bias):
    for name, temperature in itertools.product(("jsd", "forward_kl", "alpha_beta"), (1.0, 2.0)):
        case = Case(scale=scale, softcap=softcap, bias=bias)
        case.check(name, ce=True, loss_temperature=temperature, chunk_size=5)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 9),
    vocab=st.integers(2, 25),
    chunk=st.one_of(st.none(), st.integers(1, 12)),
    variant=st.sampled_from(ALL),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    k=st.one_of(st.none(), st.integers(1, 30)),
    ce=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, vocab, chunk, variant, temperature, k, ce, seed):
    case = Case(n=n, vocab=vocab, seed=seed)
    case.check(*variant, chunk_size=chunk, loss_temperature=temperature, teacher_top_k=k, ce=ce, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradient_equal_the_definition(tmp_path, monkeypatch, beta, peft):
    memory = Remember(monkeypatch)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False) if peft else None
    trainer = trainer_of(tmp_path, beta=beta, lmbda=0.5, gradient_accumulation_steps=2, peft_config=lora)
    reference = tiny_model(seed=1) if lora is None else get_peft_model(tiny_model(seed=1), copy.deepcopy(lora))
    reference.load_state_dict(trainer.model.state_dict())
    gradient = -change(trainer)
    expected = dense_loss(reference, trainer.teacher_model, memory.windows[0], beta)
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in reference.parameters() if p.requires_grad])
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=2e-4)  # the log rounds to four digits
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_cross_entropy_is_mixed_in_on_data_tokens_only(tmp_path, monkeypatch, weight):
    memory = Remember(monkeypatch)
    trainer = trainer_of(tmp_path, lmbda=0.5, ce_weight=weight, learning_rate=0.0)
    trainer.train()
    window = memory.windows[0]
    divergence, number = 0.0, sum(s.num_targets for s in window)
    cross_entropy = 0.0
    for sequence in window:
        divergence += dense_loss(trainer.model, trainer.teacher_model, [sequence]).item() * sequence.num_targets
        if sequence.source == "data":
            ids = torch.tensor([sequence.input_ids])
            logits = trainer.model(input_ids=ids).logits[0, :-1].double()
            target = torch.tensor(sequence.labels[1:])
            cross_entropy += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
    assert cross_entropy > 0
    expected = ((1 - weight) * divergence + weight * cross_entropy) / number
    assert losses(trainer)[0] == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "gpt2", "llama"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_soft_caps_and_logit_scales_are_the_models_own(tmp_path, monkeypatch, kind, role):
    options = {"gemma2": {"final_logit_softcapping": 3.0}, "granite": {"logits_scaling": 4.0}}.get(kind, {})
    models = {"student": tiny_model(seed=1), "teacher": tiny_model(seed=2), role: tiny_model(kind, seed=3, **options)}
    memory = Remember(monkeypatch)
    trainer = trainer_of(tmp_path, **models, lmbda=0.5, learning_rate=0.0)
    trainer.train()
    expected = dense_loss(trainer.model, trainer.teacher_model, memory.windows[0]).item()
    assert losses(trainer)[0] == pytest.approx(expected, rel=3e-4)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_changes_its_logits_otherwise_is_refused(tmp_path, role):
    model = tiny_model(seed=3)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + torch.arange(logits.shape[-1]))
    with pytest.raises(ValueError, match="does something to its logits"):
        trainer_of(tmp_path, **{role: model})


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(259, 300), (300, 259)])
def test_heads_of_different_size_train_on_the_shared_ids(tmp_path, monkeypatch, student_rows, teacher_rows):
    """Both distributions are restricted to the shared ids, and nobody writes an id that the other cannot read."""
    memory = Remember(monkeypatch)
    trainer = trainer_of(
        tmp_path,
        student=tiny_model(seed=1, vocab=student_rows),
        teacher=tiny_model(seed=2, vocab=teacher_rows),
        lmbda=0.5,
        seq_kd=True,
        max_new_tokens=32,
        temperature=5.0,
        learning_rate=0.0,
    )
    trainer.train()
    window = memory.windows[0]
    assert max(max(s.input_ids) for s in window) < 259
    total, number = 0.0, 0
    for sequence in window:
        ids = torch.tensor([sequence.input_ids])
        keep = torch.tensor(sequence.labels[1:]) != -100
        with torch.no_grad():
            q, p = (
                m(input_ids=ids).logits[0, :-1, :259].double().softmax(-1)[keep]
                for m in (trainer.model, trainer.teacher_model)
            )
        m = (p + q) / 2
        total += 0.5 * (p * (p / m).log() + q * (q / m).log()).sum().item()
        number += int(keep.sum())
    assert losses(trainer)[0] == pytest.approx(total / number, rel=2e-4)
