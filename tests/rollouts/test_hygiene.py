"""Unsound completions: counted by source whatever happens to them, and left out of the loss only on request."""

import pytest
from datasets import Dataset
from tiny import tiny_rows, tiny_tokenizer
from training import Remember, change, logged, losses, trainer_of

from gkd.config.fields import GKDConfig
from gkd.rollouts.hygiene import Hygiene

STOP = 258
LOOP = [5, 6] * 4  # 5 4-grams, 2 different: share 0.6
SOUND = [1, 2, 3, 4, 5, 6, 7, STOP]


def rules(**values):
    return Hygiene({"student": (STOP,), "teacher": (STOP, 30)}, max_new_tokens=8, **values)


@pytest.mark.parametrize(
    ("completion", "source", "expected"),
    [  # expected: ended, truncated, empty, repetitive
        (SOUND, "student", (True, False, False, False)),
        ([1, 2, 3, 4, 5, 6, 7, 8], "student", (False, True, False, False)),
        ([1, 2, 3, 4, 5, 6, 7, 30], "student", (False, True, False, False)),
        ([1, 2, 3, 4, 5, 6, 7, 30], "teacher", (True, False, False, False)),
        ([1, 2, 3, 4, 5, 6, 7, 8], "data", (False, False, False, False)),
        ([*range(20), STOP], "data", (True, False, False, False)),
        ([STOP], "student", (True, False, True, False)),
        ([30], "teacher", (True, False, True, False)),
        ([30], "student", (False, False, False, False)),
        ([], "data", (False, False, True, False)),
        ([9], "data", (False, False, False, False)),
        (LOOP, "student", (False, True, False, True)),
        ([4] * 6 + [STOP], "teacher", (True, False, False, False)),  # 4 4-grams, 2 different: 0.5 is not more than 0.5
        ([4] * 7 + [STOP], "teacher", (True, False, False, True)),
        ([7] * 5, "data", (False, False, False, False)),
        ([7] * 6, "data", (False, False, False, True)),
    ],
    ids=str,
)
def test_what_a_completion_is_like(completion, source, expected):
    verdict = rules().judge(completion, source)
    assert (verdict.ended, verdict.truncated, verdict.empty, verdict.repetitive) == expected


def test_the_threshold_is_a_share_of_the_4_grams():
    assert rules(repetition_threshold=0.59).judge(LOOP, "student").repetitive
    assert not rules(repetition_threshold=0.6).judge(LOOP, "student").repetitive
    assert not rules(repetition_threshold=1.0).judge([3] * 500, "student").repetitive


@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("repetitive", [True, False])
def test_what_is_trained_on(truncated, repetitive):
    hygiene = rules(train_truncated=truncated, train_repetitive=repetitive)
    assert hygiene.trains(hygiene.judge(SOUND, "student"))
    assert hygiene.trains(hygiene.judge([STOP], "student"))
    assert hygiene.trains(hygiene.judge([*range(8)], "student")) == truncated
    assert hygiene.trains(hygiene.judge([4] * 7 + [STOP], "student")) == repetitive
    assert hygiene.trains(hygiene.judge(LOOP, "student")) == (truncated and repetitive)


def scripted(trainer, monkeypatch, answers):
    """The student's rollouts give these completions in turn."""
    monkeypatch.setattr(trainer.rollouts["student"], "generate", lambda prompts, *a: answers[: len(prompts)])


def test_counts_are_shares_of_the_sequences_by_source(tmp_path, monkeypatch):
    rows = [{"prompt": "go ", "completion": "ab" * 30}] * 8
    trainer = trainer_of(tmp_path, Dataset.from_list(rows), lmbda=0.5, per_device_train_batch_size=8)
    scripted(trainer, monkeypatch, [LOOP, SOUND, [STOP], [5, 5, 5, 5, 5, 5, 5, STOP]])
    trainer.train()
    for name, student, data in (("repetitive", 0.5, 1.0), ("empty", 0.25, 0.0), ("truncated", 0.25, 0.0)):
        assert logged(trainer, f"rollout/{name}") == [student]  # of what was generated
        assert logged(trainer, f"rollout/{name}/student") == [student]
        assert logged(trainer, f"rollout/{name}/data") == [data]
    assert logged(trainer, "rollout/ended") == [0.75]


@pytest.mark.parametrize("drop", [False, True])
def test_repetitive_rollouts_can_be_left_out_of_the_loss_and_are_counted_all_the_same(tmp_path, monkeypatch, drop):
    memory = Remember(monkeypatch)
    rows = Dataset.from_list([{"prompt": "go ", "completion": "ab" * 30}] * 8)
    values = {"lmbda": 0.5, "per_device_train_batch_size": 8, "drop_repetitive_completions": drop}
    trainer = trainer_of(tmp_path, rows, **values)
    scripted(trainer, monkeypatch, [LOOP, SOUND, LOOP, [STOP]])
    trainer.train()
    targets = [(s.source, s.num_targets) for s in memory.windows[0]]
    loop = 0 if drop else len(LOOP)
    assert sorted(n for source, n in targets if source == "student") == sorted([loop, len(SOUND), loop, 1])
    assert all(n >= 60 for source, n in targets if source == "data")  # data rows stay, whatever they are like
    assert logged(trainer, "rollout/repetitive") == [0.5]
    assert trainer.ledger.sequences["student"] == (2 if drop else 4)
    assert trainer.ledger.targets["student"] == 2 * loop + len(SOUND) + 1


def test_the_loss_is_the_mean_over_what_is_left(tmp_path, monkeypatch):
    """A dropped rollout changes neither gradient nor loss of the others."""
    results = []
    for answers in ([LOOP, SOUND, LOOP, [1, STOP]], [LOOP[::-1], SOUND, [6, 5] * 4, [1, STOP]]):
        trainer = trainer_of(
            tmp_path, Dataset.from_list([{"prompt": "go "}] * 4), lmbda=1.0, drop_repetitive_completions=True
        )
        scripted(trainer, monkeypatch, answers)
        results.append((change(trainer), losses(trainer)[0]))
    assert results[0][1] == results[1][1] > 0
    assert (results[0][0] - results[1][0]).abs().max() < 1e-6 * results[0][0].abs().max()


def test_the_teachers_loops_are_dropped_too(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    rows = Dataset.from_list(tiny_rows(8))
    values = {"seq_kd": True, "lmbda": 0.0, "teacher_temperature": 0.0, "max_new_tokens": 40, "learning_rate": 0.0}
    values["generation_kwargs"] = {"suppress_tokens": list(range(2, 259))}  # two tokens are left: it loops
    trainer_of(tmp_path, rows, per_device_train_batch_size=8, drop_repetitive_completions=True, **values).train()
    window = memory.windows[0]
    own = [s.input_ids[s.prompt_length :] for s in window]
    looping = [len({tuple(c[i : i + 4]) for i in range(len(c) - 3)}) < (len(c) - 3) / 2 for c in own]
    assert sum(looping) > 0
    assert [s.num_targets == 0 for s in window] == looping


def test_threshold_out_of_range():
    with pytest.raises(ValueError, match=r"repetition_threshold=-0.1"):
        GKDConfig("out", repetition_threshold=-0.1)
    assert tiny_tokenizer().eos_token_id == STOP
