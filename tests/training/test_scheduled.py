"""Fields that follow a schedule, in a training: each step is that of a run with the step's value as its number."""

import pytest
import torch
from datasets import Dataset
from tiny import tiny_rows
from training import Remember, logged, losses, trainer_of
from transformers import TrainerCallback

from gkd.config.schedules import schedule_of

STEPS = 5
STILL = {"max_steps": STEPS, "learning_rate": 0.0, "gradient_accumulation_steps": 2, "lmbda": 0.5}
SHARES = "0@0 1@3 0.5@4"


def windows_of(monkeypatch, folder, **values):
    """The trained windows of a run whose weights never move, and its trainer."""
    with monkeypatch.context() as patched:
        seen = Remember(patched)
        trainer = trainer_of(folder, **{**STILL, **values})
        trainer.train()
    assert len(seen.windows) == STEPS
    return [[(s.row, s.source, tuple(s.input_ids), s.truncated) for s in w] for w in seen.windows], trainer


def value(name, text, step):
    return schedule_of(name, text).at(step, STEPS)


def test_each_step_is_that_of_a_run_with_its_numbers(tmp_path, monkeypatch):
    texts = {
        "lmbda": SHARES,
        "max_new_tokens": "2@0% 9@100%",
        "temperature": "0@0 1.5@4 cosine",
        "beta": "0.1@0 0.9@4",
    }
    scheduled, trainer = windows_of(monkeypatch, tmp_path / "a", **texts)
    for name, text in texts.items():
        assert logged(trainer, name) == [value(name, text, step) for step in range(STEPS)]
    for step in (1, 3):
        numbers = {name: value(name, text, step) for name, text in texts.items()}
        fixed, other = windows_of(monkeypatch, tmp_path / str(step), **numbers)
        assert scheduled[step] == fixed[step]
        assert losses(trainer)[step] == losses(other)[step]
        assert scheduled != fixed
        assert not any(logged(other, name) for name in texts)  # a number is not logged


def test_the_realised_share_is_the_schedules_to_one_row(tmp_path, monkeypatch):
    windows, trainer = windows_of(monkeypatch, tmp_path, lmbda="0@0% 1@70% cosine")
    rows = len(windows[0])
    assert rows == 8
    for step, window in enumerate(windows):
        written = sum(source == "student" for _, source, *_ in window)
        assert abs(written - rows * value("lmbda", "0@0% 1@70% cosine", step)) < 1
        assert logged(trainer, "lmbda_realised")[step] == pytest.approx(written / rows)


def test_a_short_cap_cuts_the_students_rollouts_alone(tmp_path, monkeypatch):
    """The teacher's sequences are kept, and have the most tokens in every step."""
    windows, trainer = windows_of(monkeypatch, tmp_path, max_new_tokens="2@0 6@4", seq_kd=True)
    prompts = {row["row"]: row["prompt_length"] for row in trainer.train_dataset}
    for step, window in enumerate(windows):
        for row, source, ids, truncated in window:
            cap = value("max_new_tokens", "2@0 6@4", step) if source == "student" else 6
            length = len(ids) - prompts[row]
            assert length <= cap
            assert truncated == (length == cap and ids[-1] not in trainer.stop_ids[source])
    assert any(truncated for _, source, _, truncated in windows[0] if source == "student")


def test_evaluations_are_by_the_last_beta(tmp_path):
    rows = Dataset.from_list(tiny_rows(8))
    evaluated = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 3}
    trainer = trainer_of(tmp_path / "a", **STILL, **evaluated, beta="0.1@0 0.9@4")
    trainer.train()
    fixed = trainer_of(tmp_path / "b", **STILL, **evaluated, beta=0.9)
    fixed.train()
    assert logged(trainer, "eval_loss") == logged(fixed, "eval_loss")
    assert trainer.evaluate()["eval_loss"] == fixed.evaluate()["eval_loss"]


def test_behind_the_training_sampling_is_as_before_it(tmp_path):
    trainer = trainer_of(tmp_path, **STILL, max_new_tokens="9@0 2@4", temperature="1@0 0.5@9")
    before = trainer.rollouts["student"].settings
    assert (before.max_new_tokens, before.temperature) == (9, 0.5)
    trainer.train()
    assert trainer.rollouts["student"].settings == before


class At(TrainerCallback):
    """Does something at the end of a step, counted from 1."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def test_a_number_that_is_set_takes_the_schedules_place(tmp_path):
    trainer = trainer_of(tmp_path, **{**STILL, "lmbda": SHARES, "beta": "0.1@0 0.9@4", "temperature": "1@0 0.6@4"})

    def change():
        assert (trainer.lmbda, trainer.beta, trainer.temperature) == (
            value("lmbda", SHARES, 2),
            value("beta", "0.1@0 0.9@4", 2),
            value("temperature", "1@0 0.6@4", 2),
        )
        trainer.lmbda, trainer.beta, trainer.temperature = 0.25, 0.7, 0.8

    trainer.add_callback(At(2, change))
    trainer.train()
    assert logged(trainer, "lmbda_realised")[2:] == [0.25] * 3
    assert len(logged(trainer, "lmbda")) == len(logged(trainer, "beta")) == len(logged(trainer, "temperature")) == 1
    assert trainer.loss_settings.divergence.name == "jsd(beta=0.7)"
    assert trainer.rollouts["student"].settings.temperature == 0.8


def test_what_is_changed_of_the_generation_config_leaves_the_schedule_alone(tmp_path):
    trainer = trainer_of(tmp_path, **STILL, max_new_tokens="2@0 6@4")
    seen = []

    def look():
        assert trainer.generation_config.max_new_tokens == value("max_new_tokens", "2@0 6@4", len(seen))
        trainer.generation_config.top_k = 5
        settings = trainer.rollouts["student"].settings
        seen.append((settings.max_new_tokens, settings.top_k))

    for step in range(1, STEPS + 1):
        trainer.add_callback(At(step, look))
    trainer.train()
    assert seen == [(2, 0), (3, 5), (4, 5), (5, 5), (6, 5)]


def test_a_schedule_costs_no_other_gradient(tmp_path):
    """The divergence that is made anew in each step is the one that the field names."""
    moving = {"max_steps": 2, "learning_rate": 0.5, "lmbda": 0.0}
    one = trainer_of(tmp_path / "a", **moving, beta="0.3@0 0.3000001@1000000")
    two = trainer_of(tmp_path / "b", **moving, beta=0.3)
    for trainer in (one, two):
        trainer.train()
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
