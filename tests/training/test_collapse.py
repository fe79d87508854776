"""The guard against collapse: induced on both sides, and what it does about it; what it never does to a sound run."""

import pytest
import torch
from collapsing import STOP, collapsing
from datasets import Dataset
from resumed import history
from safetensors.torch import load_file
from training import logged, trainer_of

from gkd.training.steering import MOST_ROLLBACKS

GUARDS = {"never stops": "stop", "stops at once": "rollback", "learning rate": "rollback"}
MEASURES = {"never stops": "truncated", "stops at once": "empty", "learning rate": "truncated"}
LIMIT = 0.5  # of shares, where the answers of the data are sound


def shares(trainer, name):
    return logged(trainer, f"rollout/{name}/student")


def rollouts(trainer):
    """Of the present weights, for the prompts of the data."""
    prompts = [row["input_ids"][: row["prompt_length"]] for row in trainer.train_dataset]
    return trainer.rollouts["student"].generate(prompts, 999)


def is_bad(completion, name, cap=40):
    return completion == [STOP] if name == "empty" else len(completion) == cap and completion[-1] != STOP


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory):
    made = {}
    for case in MEASURES:
        made[case] = collapsing(tmp_path_factory.mktemp("unguarded"), case)
        made[case].train()
    return made


@pytest.mark.parametrize("case", MEASURES)
def test_a_collapse_is_undone(tmp_path, unguarded, case):
    found = shares(unguarded[case], MEASURES[case])
    assert max(found) > 0.9
    guarded = collapsing(tmp_path, case, collapse_guard=GUARDS[case])
    guarded.train()
    events = guarded.record.steering.events
    crossed = next(step for step, share in enumerate(found) if share > LIMIT)  # a step alone
    assert events[0]["step"] <= crossed + 10
    back = ["rollback"] * MOST_ROLLBACKS if GUARDS[case] == "rollback" else []
    assert [event["action"] for event in events] == [*back, "stop"][: len(events)]
    assert guarded.optimizer.param_groups[0]["initial_lr"] == pytest.approx(
        guarded.args.learning_rate / 2 ** min(len(events), len(back))
    )
    written = rollouts(guarded)
    assert sum(is_bad(one, MEASURES[case]) for one in written) / len(written) < 0.3
    if guarded.steering.has_ended:  # the weights are those of the last sound checkpoint
        saved = load_file(tmp_path / guarded.record.steering.healthy / "model.safetensors")
        own = dict(guarded.model.named_parameters())
        assert all(torch.equal(value, own[name]) for name, value in saved.items())
        assert guarded.state.global_step == int(events[-1]["back_to"])


def test_the_guard_looks_and_changes_nothing(tmp_path, unguarded):
    """A run that is warned of is the run without a guard, bit for bit."""
    for case in ("stops at once", "learning rate"):
        run = unguarded[case]
        warned = collapsing(tmp_path / case, case, collapse_guard="warn")
        warned.train()
        guards = ("guard/events",)
        assert [{k: v for k, v in entry.items() if k not in guards} for entry in history(warned)] == history(run)
        for one, two in zip(warned.model.parameters(), run.model.parameters(), strict=True):
            assert torch.equal(one, two)
        (event,) = warned.record.steering.events[:1]
        assert event["action"] == "warn"
        assert warned.state.log_history[-1]["collapse_events"] == warned.record.steering.events
        assert "collapse_events" not in run.state.log_history[-1]
        warned.create_model_card()
        card = (tmp_path / case / "README.md").read_text()
        assert "The guard against collapse (`collapse_guard`) acted:" in card
        assert f"the student's rollouts have collapsed at step {event['step']}" in card


def test_the_share_of_the_student_is_halved(tmp_path):
    trainer = collapsing(tmp_path, "never stops", collapse_guard="lower_lmbda")
    trainer.train()
    events = trainer.record.steering.events
    realised = logged(trainer, "lmbda_realised")
    assert events[0]["action"] == "lower_lmbda"
    assert realised[: events[0]["step"] + 1] == [1.0] * (events[0]["step"] + 1)
    assert realised[events[0]["step"] + 1] == 0.5
    assert logged(trainer, "lmbda")[-1] == 0.5 ** len(events) == logged(trainer, "guard/lmbda_factor")[-1]


def test_a_killed_run_that_was_rolled_back_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = collapsing(tmp_path / "whole", "learning rate", collapse_guard="rollback", max_steps=8)
    whole.train()
    back = int(whole.record.steering.events[0]["back_to"])

    first = collapsing(tmp_path / "parts", "learning rate", collapse_guard="rollback", max_steps=8)

    class Killed(BaseException):
        pass

    def stop(*args, **kwargs):
        if first.record.steering.rollbacks:
            raise Killed
        return type(first).training_step(first, *args, **kwargs)

    monkeypatch.setattr(first, "training_step", stop)  # before anything is saved behind the rollback
    with pytest.raises(Killed):
        first.train()
    second = collapsing(tmp_path / "parts", "learning rate", collapse_guard="rollback", max_steps=8)
    second.train(resume_from_checkpoint=True)
    assert second.record.steering.as_dict() == whole.record.steering.as_dict()
    assert history(second) == history(whole)
    for one, two in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert logged(second, "learning_rate")[back] == pytest.approx(0.25)


def test_a_sound_run_has_no_alarm(tmp_path):
    """studies/collapse has more of them."""
    trainer = collapsing(tmp_path, "learning rate", learning_rate=2.5e-2, collapse_guard="stop", save_steps=50)
    trainer.train()
    assert not trainer.record.steering.events
    assert trainer.state.global_step == 12


def test_the_share_that_the_run_decides_follows_its_rollouts(tmp_path):
    up = collapsing(tmp_path / "up", "learning rate", learning_rate=5e-3, lmbda="auto", collapse_window=2)
    up.train()
    shares = logged(up, "lmbda")
    assert (shares[0], shares[-1] > 0.35) == (0.25, True)
    assert shares == sorted(shares)
    rows = 16
    for share, realised in zip(shares, logged(up, "lmbda_realised"), strict=True):
        assert abs(realised - share) * rows < 1
    down = collapsing(tmp_path / "down", "never stops", lmbda="auto", collapse_window=2)
    down.train()
    assert logged(down, "lmbda")[-1] == pytest.approx(0.1)


def test_prompts_without_answers_leave_nothing_to_lower_to(tmp_path):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi"}]}] * 8)
    with pytest.raises(ValueError, match="no collapse_guard that lowers lmbda"):
        trainer_of(tmp_path, rows, lmbda=1.0, collapse_guard="lower_lmbda")
