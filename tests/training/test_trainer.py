"""The laws of design.md section 7 that one process can show: cut, definition, masks, frozen teacher, equal models."""

import copy
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_rows
from training import Remember, change, dense_loss, logged, losses, trainer_of

from gkd.loss.dense import generalized_jsd_loss
from gkd.training.trainer import GKDTrainer

# ------------------------------------------------------------------------------------------- law 1: the cut


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize(("lmbda", "seq_kd"), [(0.0, False), (0.5, False), (0.5, True), (1.0, False)])
def test_the_cut_into_micro_batches_does_not_matter(tmp_path, lmbda, seq_kd, reduction):
    results = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = trainer_of(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            lmbda=lmbda,
            seq_kd=seq_kd,
            loss_reduction=reduction,
            loss_chunk_size=7 * batch,
            teacher_cache_dir="off",  # the teacher writes in every cut, not in the first one only
        )
        results.append((change(trainer), losses(trainer)[0]))
    for gradient, loss in results[1:]:
        torch.testing.assert_close(gradient, results[0][0], rtol=1e-5, atol=1e-5 * results[0][0].abs().max().item())
        assert loss == pytest.approx(results[0][1], rel=1e-5)


def test_a_last_window_that_is_shorter_is_still_a_token_mean(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    trainer = trainer_of(
        tmp_path, Dataset.from_list(tiny_rows(6)), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=-1, num_train_epochs=1, learning_rate=0.0, lmbda=0.0,
    )  # fmt: skip
    trainer.train()
    assert [len(window) for window in memory.windows] == [4, 2]
    for loss, window in zip(losses(trainer), memory.windows, strict=True):
        assert loss == pytest.approx(dense_loss(trainer.model, trainer.teacher_model, window).item(), rel=1e-4)


# ------------------------------------------------------------------------- law 2: the loss is its definition


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


def test_denominator_is_the_number_of_generated_tokens(tmp_path):
    """Data answers of 3 tokens and of 300 give the same on-policy loss and gradient."""
    results = []
    for words in ("ok.", "x" * 299):
        rows = [{"prompt": f"say {i} ", "completion": words} for i in range(4)]
        trainer = trainer_of(tmp_path, Dataset.from_list(rows), lmbda=1.0, max_length=512)
        results.append((change(trainer), losses(trainer)[0]))
    assert results[0][1] == results[1][1] > 0
    assert torch.equal(results[0][0], results[1][0])


def test_sampling_temperature_does_not_touch_the_loss_and_loss_temperature_does(tmp_path):
    def loss(**values):
        trainer = trainer_of(tmp_path, lmbda=0.0, **values)
        trainer.train()
        return losses(trainer)[0]

    plain = loss(temperature=0.7)
    assert loss(temperature=1.3) == plain
    assert loss(loss_temperature=2.0) != plain


def test_static_loss_is_the_one_of_the_package():
    assert GKDTrainer.generalized_jsd_loss is generalized_jsd_loss


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


# ------------------------------------------------------------------------------------------------ rollouts


def test_one_generate_call_per_source_and_step(tmp_path, monkeypatch):
    trainer = trainer_of(
        tmp_path, lmbda=0.5, seq_kd=True, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2
    )
    calls = []
    for source, rollout in trainer.rollouts.items():
        original = rollout.generate
        monkeypatch.setattr(
            rollout, "generate", lambda p, s, *r, o=original, n=source: (calls.append((n, s, len(p))), o(p, s, *r))[1]
        )
    trainer.train()
    assert calls == [("student", 0, 4), ("teacher", 0, 4), ("student", 1, 4), ("teacher", 1, 4)]
    assert trainer.ledger.sequences == {"data": 0, "student": 8, "teacher": 8}


@pytest.mark.parametrize(
    ("lmbda", "seq_kd", "never"), [(1.0, True, "teacher"), (0.0, True, "student"), (0.0, False, "student")]
)
def test_nothing_is_generated_and_thrown_away(tmp_path, monkeypatch, lmbda, seq_kd, never):
    trainer = trainer_of(tmp_path, lmbda=lmbda, seq_kd=seq_kd)
    monkeypatch.setattr(trainer.rollouts[never], "generate", lambda *a: pytest.fail(f"{never} generated"))
    trainer.train()


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_prompt_only_rows_train_on_rollouts(tmp_path, key):
    value = "count " if key == "prompt" else [{"role": "user", "content": "count"}]
    trainer = trainer_of(tmp_path, Dataset.from_list([{key: value}] * 4), lmbda=1.0)
    trainer.train()
    assert losses(trainer)[0] > 0
    assert trainer.ledger.targets["student"] > 0


def test_truncated_completions_can_be_left_out_of_the_loss(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    trainer = trainer_of(tmp_path, lmbda=1.0, mask_truncated_completions=True, max_new_tokens=2, learning_rate=0.0)
    trainer.train()
    assert logged(trainer, "rollout/truncated")[0] > 0
    assert all(s.num_targets == 0 for s in memory.windows[0] if s.truncated)


def test_a_window_without_any_target_is_no_step(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, lmbda=1.0, mask_truncated_completions=True, max_new_tokens=1)
    stop = trainer.stop_ids["student"][0]
    rollout = trainer.rollouts["student"]
    monkeypatch.setattr(rollout, "generate", lambda prompts, *a: [[(stop + 1) % 256] for _ in prompts])
    assert change(trainer).abs().max() == 0
    assert losses(trainer) == []


# ----------------------------------------------------------------------------- laws 6 and 8: the teacher


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


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_models_give_no_loss_and_no_gradient(tmp_path, beta):
    trainer = trainer_of(tmp_path, student=tiny_model(seed=3), teacher=tiny_model(seed=3), beta=beta, lmbda=0.5)
    assert change(trainer).abs().max() < 1e-6
    assert abs(losses(trainer)[0]) < 1e-6


def test_one_object_as_both_models_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="the same object"):
        trainer_of(tmp_path, student=model, teacher=model)


def test_dropout_is_off_but_lora_dropout_stays(tmp_path):
    student = tiny_model("gpt2", seed=1, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    lora = LoraConfig(r=2, lora_dropout=0.25, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = trainer_of(tmp_path, student=student, peft_config=lora)
    chances = {name: m.p for name, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for name, p in chances.items() if "lora_dropout" in name} == {0.25}
    assert {p for name, p in chances.items() if "lora_dropout" not in name} == {0.0}


# ---------------------------------------------------------------------------------------------- evaluation


def test_evaluation_is_the_token_mean_on_the_data_and_moves_no_random_stream(tmp_path, monkeypatch):
    eval_rows = Dataset.from_list(tiny_rows(5, seed=9))
    trainer = trainer_of(tmp_path, eval_dataset=eval_rows, lmbda=1.0, per_device_eval_batch_size=2)
    for rollout in trainer.rollouts.values():
        monkeypatch.setattr(rollout, "generate", lambda *a: pytest.fail("evaluation generated"))
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    metrics = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    from gkd.data.sequences import unpad

    sequences = [s for batch in trainer.get_eval_dataloader() for s in unpad(batch)]
    assert metrics["eval_loss"] == pytest.approx(
        dense_loss(trainer.model, trainer.teacher_model, sequences).item(), rel=1e-5
    )
    assert metrics["eval_student/entropy"] > 0
    assert trainer.evaluate(eval_rows)["eval_loss"] == pytest.approx(metrics["eval_loss"])


def test_evaluation_between_steps_changes_nothing(tmp_path):
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"])
    results = []
    for strategy in ("no", "steps"):
        trainer = trainer_of(
            tmp_path, max_steps=3, lmbda=0.5, eval_dataset=Dataset.from_list(tiny_rows(4, seed=9)),
            eval_strategy=strategy, eval_steps=1, peft_config=copy.deepcopy(lora),
        )  # fmt: skip
        results.append(change(trainer))
    assert torch.equal(*results)


# ------------------------------------------------------------------------------- models with a life of their own


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


# -------------------------------------------------------------------------------- vocabularies of different size


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
