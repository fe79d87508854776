"""A checkpoint says what it belongs to: going on with something else is told, once, with the old value and the new."""

import logging
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_model, tiny_rows
from training import trainer_of

from gkd.training.belongs import differences, rows_of

VALUES = {
    "max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_grad_norm": 1.0,
    "lmbda": 0.0, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1,
}  # fmt: skip


def build(folder, rows=None, r=4, alpha=8, **values):
    lora = LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    rows = Dataset.from_list(tiny_rows(12) if rows is None else rows)
    return trainer_of(folder, rows, peft_config=lora, **{**VALUES, **values})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build(folder).train()
    shutil.rmtree(folder / "checkpoint-6")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def warnings_of(caplog):
    return [
        record.getMessage() for record in caplog.records if "something else than it was saved" in record.getMessage()
    ]


def resume(folder, caplog, **changed):
    trainer = build(folder, **changed)
    with caplog.at_level(logging.WARNING, "gkd"):
        trainer.train(resume_from_checkpoint=True)
    return trainer


def test_nothing_changed_nothing_said(folder, caplog):
    """Nor when only what has no effect on the training was: where it logs, what it keeps, how it loads."""
    resume(folder, caplog, logging_steps=2, save_steps=1, dataloader_num_workers=1, disable_tqdm=True, run_name="b")
    assert warnings_of(caplog) == []


CHANGES = {
    "lmbda": ({"lmbda": 1.0}, "lmbda 0.0 -> 1.0"),
    "beta": ({"beta": 0.1}, "beta 0.5 -> 0.1"),
    "seed": ({"seed": 6}, "seed 5 -> 6"),
    "divergence": ({"divergence": "forward_kl"}, "divergence jsd -> forward_kl"),
    "alpha": ({"alpha": 16}, "LoRA's lora_alpha 8 -> 16"),
    "fewer rows": ({"rows": tiny_rows(11)}, "rows 12 rows, checksum "),
    "other rows": ({"rows": tiny_rows(13)[1:]}, "rows 12 rows, checksum "),
    "another order": ({"rows": tiny_rows(12)[::-1]}, "rows 12 rows, checksum "),
    "teacher": ({"teacher": tiny_model(hidden=48, layers=3, seed=9)}, "teacher in memory (weights "),
    "batch": ({"per_device_train_batch_size": 2}, "per_device_train_batch_size 4 -> 2"),
    "schedule": ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type linear -> cosine"),
    "precision": ({"bf16": True}, "precision no -> bf16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_told_in_one_warning(folder, caplog, change):
    values, told = CHANGES[change]
    resume(folder, caplog, **values)
    (warning,) = warnings_of(caplog)
    assert told in warning
    assert "checkpoint-3" in warning


REFUSED = {
    "rank of LoRA": ({"r": 8}, "trained parameters"),
    "another base": ({"student": tiny_model(seed=8)}, "student's frozen weights"),
    "another size": ({"student": tiny_model(seed=1, hidden=48)}, "trained parameters"),
    "another optimizer": ({"optim": "sgd"}, "optimizer adamw_torch -> sgd"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_makes_the_state_meaningless_is_refused(folder, caplog, change):
    values, told = REFUSED[change]
    with pytest.raises(ValueError, match="is of another training") as error:
        resume(folder, caplog, **values)
    assert told in str(error.value)


def rates(trainer):
    return [
        entry["learning_rate"] for entry in trainer.state.log_history if entry.get("step", 0) > 3 and "loss" in entry
    ]


def test_a_new_learning_rate_holds(folder, caplog):
    """The schedule is linear over six steps: steps 4 to 6 have 3/6, 2/6 and 1/6 of whatever the rate is."""
    trainer = resume(folder, caplog, learning_rate=1e-3, weight_decay=0.0)
    assert rates(trainer) == pytest.approx([0.5e-3, 1e-3 / 3, 1e-3 / 6])
    assert "learning_rate 0.01 -> 0.001" in warnings_of(caplog)[0]
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}
    assert len(torch.load(folder / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]) > 0


def test_a_longer_training_has_its_own_schedule(folder, caplog):
    trainer = resume(folder, caplog, max_steps=8)
    assert rates(trainer) == pytest.approx([1e-2 * (8 - step) / 8 for step in range(3, 8)])


def test_a_rate_that_does_not_hold_is_told(tmp_path, caplog):
    values = {
        "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 3, "max_steps": 3,
        "eval_dataset": Dataset.from_list(tiny_rows(2)), "metric_for_best_model": "loss",
    }  # fmt: skip
    build(tmp_path, **values).train()
    trainer = resume(tmp_path, caplog, **{**values, "max_steps": 4, "eval_steps": 1, "learning_rate": 1e-3})
    assert "learning_rate 0.01 -> 0.001" in warnings_of(caplog)[0]
    held = trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert held or "learning_rate does not hold" in warnings_of(caplog)[0]


def test_checksum_of_rows_is_that_of_their_content():
    rows = [{"input_ids": [1, 2, 3], "prompt_length": 1, "row": 0}, {"input_ids": [4], "prompt_length": 1, "row": 1}]
    whole = Dataset.from_list(rows)
    picked = Dataset.from_list([rows[1], rows[0], rows[1]]).select([1, 2])  # an indices mapping, another fingerprint
    assert rows_of(whole) == rows_of(picked)
    moved = [{**rows[0], "input_ids": [1, 2]}, {**rows[1], "input_ids": [3, 4]}]  # the same values, another border
    assert rows_of(Dataset.from_list(moved)) != rows_of(whole)
    assert rows_of(Dataset.from_list([{**rows[0], "prompt_length": 2}, rows[1]])) != rows_of(whole)
    assert rows_of([1, 2]) == "2 rows"


def test_a_fact_that_only_one_version_knows_says_nothing():
    assert differences({"a": 1, "gone": 2}, {"a": 1, "new": 3}) == {}
    assert differences({"a": 1}, {"a": None}) == {"a": (1, None)}
