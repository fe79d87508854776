"""Options of the trainer that reach the loss: each changes what it says, and only that."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import change, config, dense_loss, logged, losses, trainer_of
from trl.experimental.utils import DataCollatorForChatML

from gkd.assembly.models import disable_dropout
from gkd.data.sequences import unpad
from gkd.training.trainer import GKDTrainer


def test_models_may_be_named_by_a_path(tmp_path):
    folder = Path(save_tiny(tmp_path / "model", seed=1))
    rows = Dataset.from_list(tiny_rows(4))
    trainer = GKDTrainer(folder, folder, config(tmp_path / "out", max_steps=1), train_dataset=rows)
    assert trainer.teacher_model.config.vocab_size == len(trainer.processing_class)


def test_the_routers_auxiliary_loss_is_added_once_per_window(tmp_path):
    """A mean per micro-batch, averaged over the window, times its coefficient: as SFTTrainer adds it."""

    def student():
        return tiny_model("mixtral", seed=1, num_local_experts=4, num_experts_per_tok=2)

    rows = Dataset.from_list(tiny_rows(4))
    found = {}
    for coefficient in (0.0, 0.5):
        trainer = trainer_of(
            tmp_path,
            rows,
            student=student(),
            lmbda=0.0,
            router_aux_loss_coef=coefficient,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.0,
        )
        trainer.train()
        found[coefficient] = losses(trainer)[0]
    auxiliary = logged(trainer, "aux_loss")[0]
    assert auxiliary > 0
    assert found[0.5] - found[0.0] == pytest.approx(0.5 * auxiliary, rel=1e-3)


@pytest.mark.parametrize("kind", ["phimoe", "mixtral", "minimax_m2"])
def test_a_router_without_noise_trains_as_it_generates(kind):
    """PhiMoE samples its experts in training, others multiply what the router sees by random numbers."""
    noise = {"input_jitter_noise": 0.3} if kind == "phimoe" else {"router_jitter_noise": 0.3}
    model = tiny_model(kind, num_local_experts=4, num_experts_per_tok=2, head_dim=16, **noise)
    ids = torch.arange(1, 40)[None]
    expected = model(ids).logits
    model.train()
    assert not torch.equal(model(ids).logits, expected), "there is noise to turn off"
    disable_dropout(model)
    model.train()
    assert torch.equal(model(ids).logits, expected)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    changes = [change(trainer_of(tmp_path, lmbda=0.5, gradient_checkpointing=on)) for on in (False, True)]
    torch.testing.assert_close(*changes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"teacher_top_k": 8}, {"teacher_top_k": 8, "top_k_tail": "renormalize"}])
def test_a_truncated_teacher_gives_another_loss_and_the_whole_vocabulary_the_same(tmp_path, options):
    def loss(**values):
        trainer = trainer_of(tmp_path, lmbda=0.0, divergence="forward_kl", learning_rate=0.0, **values)
        trainer.train()
        return losses(trainer)[0]

    dense = loss()
    assert loss(**{**options, "teacher_top_k": 259}) == pytest.approx(dense, rel=1e-4)
    truncated = loss(**options)
    assert truncated >= 0
    assert truncated != pytest.approx(dense, rel=1e-2)


def test_temperature_squared_scales_value_and_gradient(tmp_path):
    def step(**values):
        trainer = trainer_of(tmp_path, lmbda=0.0, loss_temperature=3.0, **values)
        return change(trainer), losses(trainer)[0]

    plain, scaled = step(), step(scale_by_temperature_squared=True)
    assert scaled[1] == pytest.approx(9 * plain[1], rel=1e-3)
    torch.testing.assert_close(scaled[0], 9 * plain[0], rtol=1e-4, atol=1e-6)  # weights round at 1e-7


def test_nll_on_the_teachers_text_is_kim_and_rush(tmp_path, monkeypatch):
    from gkd.training import trainer as module

    windows, original = [], module.count
    monkeypatch.setattr(module, "count", lambda sequences: (windows.append(list(sequences)), original(sequences))[1])
    trainer = trainer_of(tmp_path, lmbda=0.0, seq_kd=True, seq_kd_loss="nll", learning_rate=0.0)
    trainer.train()
    total, number = 0.0, 0
    for sequence in windows[0]:
        logits = trainer.model(input_ids=torch.tensor([sequence.input_ids])).logits[0, :-1]
        targets = torch.tensor(sequence.labels[1:])
        total += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
        number += sequence.num_targets
    assert losses(trainer)[0] == pytest.approx(total / number, rel=2e-4)


def test_trls_own_collator_still_works(tmp_path):
    """Left-padded batches with labels: prompts are found from the labels, evaluation pads on the right again."""
    tokenizer = tiny_tokenizer(padding_side="left")
    rows = Dataset.from_list(tiny_rows(8))
    trainer = GKDTrainer(
        tiny_model(seed=1),
        tiny_model(seed=2),
        config(tmp_path, lmbda=0.5, per_device_eval_batch_size=4),
        data_collator=DataCollatorForChatML(tokenizer=tokenizer, max_length=200),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    sequences = [s for batch in trainer.get_eval_dataloader() for s in unpad(batch)]
    expected = dense_loss(trainer.model, trainer.teacher_model, sequences).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    assert trainer.ledger.sequences["student"] == 2
    assert losses(trainer)[0] > 0


def test_compute_metrics_gets_the_models_logits(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"] = prediction.predictions.shape
        return {"answer": 42.0}

    rows = Dataset.from_list(tiny_rows(4))
    trainer = GKDTrainer(
        tiny_model(seed=1),
        tiny_model(seed=2),
        config(tmp_path, lmbda=0.0),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        compute_metrics=compute_metrics,
    )
    assert trainer.evaluate()["eval_answer"] == 42.0
    assert seen["logits"][2] == 259


def test_metrics_are_what_was_trained_on(tmp_path):
    trainer = trainer_of(tmp_path, lmbda=0.5, max_steps=3, per_device_train_batch_size=4)
    trainer.train()
    assert logged(trainer, "lmbda_realised") == [0.5, 0.5, 0.5]
    assert trainer.ledger.sequences == {"data": 6, "student": 6, "teacher": 0}
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["ledger/targets/student"] == trainer.ledger.targets["student"]
    for name in ("student/entropy/data", "teacher/entropy/student", "student/agreement", "teacher/log_prob/student"):
        assert name in last
    assert last["rollout/length_max/student"] <= 8
    assert last["num_tokens"] > trainer.ledger.targets["student"] + trainer.ledger.targets["data"]
    shares = [last[f"ledger/targets/{source}"] for source in ("data", "student")]
    assert sum(shares) == sum(trainer.ledger.targets.values())


@pytest.mark.parametrize(("steps", "every", "at"), [(3, 10, [3]), (5, 2, [2, 4, 5]), (4, 2, [2, 4])])
def test_the_last_step_is_logged_too(tmp_path, steps, every, at):
    """And each loss is the mean over the steps since the log before it."""
    each = trainer_of(tmp_path, max_steps=steps, logging_steps=1, learning_rate=0.01)
    some = trainer_of(tmp_path, max_steps=steps, logging_steps=every, learning_rate=0.01)
    each.train()
    some.train()
    assert [entry["step"] for entry in some.state.log_history if "loss" in entry] == at
    starts = [0, *at[:-1]]
    means = [sum(losses(each)[start:end]) / (end - start) for start, end in zip(starts, at, strict=True)]
    assert losses(some) == pytest.approx(means, rel=1e-4)


def test_who_wants_no_log_gets_none(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=2, logging_strategy="no")
    trainer.train()
    assert losses(trainer) == []


def test_what_is_done_is_told_in_words(tmp_path, caplog):
    with caplog.at_level("INFO", logger="gkd"):
        trainer_of(tmp_path, temperature=0.7, loss_temperature=2.0, scale_by_temperature_squared=True, min_p=0.1)
    assert "rollouts: sampled at temperature 0.7, at most 8 tokens, stop ids 258, min_p 0.1" in caplog.text
    assert "loss: jsd(beta=0.5) at T = 2 times T² = 4 over the whole vocabulary" in caplog.text
    assert "Settings(" not in caplog.text
