"""A step without a target: nothing moves, nothing is counted, no mean has it in it."""

import pytest
import torch
from training import logged, losses, trainer_of
from transformers import TrainerCallback

from gkd.training import stream as module

VALUES = {
    "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "lmbda": 0.0,
    "lr_scheduler_type": "linear", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
}  # fmt: skip


def without_targets(trainer, steps, monkeypatch):
    """Leave out every target of these steps (from 0), as a mask of all rollouts does."""
    original = module.write_completions

    def write(window, sources, rollouts, step, hygiene):
        written = original(window, sources, rollouts, step, hygiene)
        if step in steps:
            for sequence in written:
                sequence.labels[:] = [-100] * len(sequence.labels)
        return written

    monkeypatch.setattr(module, "write_completions", write)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class Remember(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.states = trainer, []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        moments = [v.clone() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        self.states.append((weights(self.trainer).clone(), moments))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_nothing_moves_and_nothing_is_counted(tmp_path, monkeypatch, optim, caplog):
    trainer = trainer_of(tmp_path, **{**VALUES, "optim": optim})
    without_targets(trainer, {1, 3}, monkeypatch)
    remember = Remember(trainer)
    trainer.add_callback(remember)
    trainer.train()
    states = remember.states
    assert [torch.equal(states[i][0], states[i + 1][0]) for i in range(3)] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(states[0][1], states[1][1], strict=True))
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 3]
    assert logged(trainer, "empty_steps") == [1.0, 1.0, 2.0]
    assert trainer.record.nonfinite_steps == 0
    assert sum(trainer.ledger.sequences.values()) == 8  # two steps of four rows
    assert "step 2 has nothing to train on" in caplog.text
    assert [
        entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry
    ] == pytest.approx([1e-2 * (4 - step) / 4 for step in range(4)])


def test_a_mean_over_several_steps_is_that_of_the_others(tmp_path, monkeypatch):
    values = {**VALUES, "optim": "sgd", "learning_rate": 0.0, "weight_decay": 0.0}
    each = trainer_of(tmp_path / "each", **values)
    each.train()
    one, _, three, four = losses(each)
    both = trainer_of(tmp_path / "both", **{**values, "logging_steps": 4})
    without_targets(both, {1}, monkeypatch)
    output = both.train()
    assert losses(both) == pytest.approx([(one + three + four) / 3], rel=1e-6)
    assert output.training_loss == pytest.approx((one + three + four) / 3, rel=1e-6)


def test_masked_rollouts_make_such_steps(tmp_path, monkeypatch):
    """Of real rollouts: with a cap of one token, those that do not happen to stop there are all masked."""
    values = {**VALUES, "lmbda": 1.0, "max_new_tokens": 1, "mask_truncated_completions": True, "temperature": 0.0}
    trainer = trainer_of(tmp_path, **values)
    before = weights(trainer).clone()
    trainer.train()
    assert trainer.record.empty_steps == 4
    assert torch.equal(weights(trainer), before)
    assert losses(trainer) == []


def test_the_count_survives_a_resume(tmp_path, monkeypatch):
    values = {**VALUES, "save_strategy": "steps", "save_steps": 2}
    first = trainer_of(tmp_path, **values)
    without_targets(first, {1}, monkeypatch)
    first.train()
    second = trainer_of(tmp_path, **values)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.record.empty_steps == 1


def test_an_interrupted_step_is_not_in_the_ledger(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, **VALUES)

    def stop(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return type(trainer).training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sum(trainer.ledger.sequences.values()) == 8
