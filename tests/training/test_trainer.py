"""What a training step asks for and does beside the laws: rollouts, masks, temperatures, dropout."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_model
from training import Remember, change, logged, losses, trainer_of

from gkd.loss.dense import generalized_jsd_loss
from gkd.training.trainer import GKDTrainer


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


def test_dropout_is_off_but_lora_dropout_stays(tmp_path):
    student = tiny_model("gpt2", seed=1, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    lora = LoraConfig(r=2, lora_dropout=0.25, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = trainer_of(tmp_path, student=student, peft_config=lora)
    chances = {name: m.p for name, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for name, p in chances.items() if "lora_dropout" in name} == {0.25}
    assert {p for name, p in chances.items() if "lora_dropout" not in name} == {0.0}


# -------------------------------------------------------------------------------- vocabularies of different size
