"""Divergence along the position: every target counted once, in its bucket, source and third of the training."""

import torch
from tiny import tiny_model
from training import trainer_of

from gkd.data.sources import SOURCES
from gkd.data.targets import IGNORE, find_targets
from gkd.training.position_profile import STARTS, PositionProfile


def profile_of(values, sources, positions, step=0, max_steps=1, profile=None):
    profile = profile or PositionProfile()
    tensors = (torch.tensor(values), torch.tensor([SOURCES.index(s) for s in sources]), torch.tensor(positions))
    profile.add(*tensors, step, max_steps)
    return profile


def test_positions_count_the_targets_of_each_row():
    labels = torch.tensor([[IGNORE, IGNORE, 5, 6, 7], [IGNORE, 8, IGNORE, 9, IGNORE], [IGNORE] * 5])
    assert find_targets(labels).places.tolist() == [1, 2, 3, 1, 2]


def test_each_target_goes_into_its_bucket_source_and_third():
    profile = profile_of([1.0, 2.0, 4.0], ["student", "student", "data"], [1, 6, 7], step=0, max_steps=6)
    profile_of([8.0], ["student"], [7], step=1, max_steps=6, profile=profile)
    profile_of([16.0, 32.0], ["student", "teacher"], [10**6, 4095], step=5, max_steps=6, profile=profile)
    profile.flush(lambda values: values)
    told = profile.as_dict()
    at = {start: i for i, start in enumerate(STARTS)}
    expected = {
        ("student", 0, at[1]): (1.0, 1),
        ("student", 0, at[6]): (10.0, 2),  # positions 6 and 7 share a bucket
        ("data", 0, at[6]): (4.0, 1),
        ("student", 2, at[4096]): (16.0, 1),
        ("teacher", 2, at[3072]): (32.0, 1),
    }
    found = {
        (source, third, i): (told["sums"][source][third][i], count)
        for source in SOURCES
        for third, counts in enumerate(told["counts"][source])
        for i, count in enumerate(counts)
        if count
    }
    assert found == expected


def test_ranks_are_summed_once_and_a_resume_goes_on():
    profile = profile_of([1.0], ["data"], [1])
    profile.flush(lambda values: 2 * values)  # two ranks with the same
    profile.flush(lambda values: 2 * values)  # nothing new since
    resumed = PositionProfile()
    resumed.load(profile.as_dict())
    assert resumed.as_dict() == profile.as_dict()
    profile_of([5.0], ["data"], [1], profile=resumed)
    resumed.flush(lambda values: values)
    assert (resumed.as_dict()["sums"]["data"][0][0], resumed.as_dict()["counts"]["data"][0][0]) == (7.0, 3)


def test_a_training_leaves_the_profile_in_its_history(tmp_path):
    """Sums over all buckets against the definition; the last step is not a logged one."""
    student, teacher = tiny_model(seed=1), tiny_model(hidden=48, layers=3, seed=2)
    kept = []
    trainer = trainer_of(tmp_path, student=student, teacher=teacher, learning_rate=0.0, max_steps=4, logging_steps=3)
    collect = trainer.training_log.observe
    trainer.training_log.observe = lambda *args: (kept.append(args), collect(*args))
    trainer.train()
    last = trainer.state.log_history[-1]
    assert "train_loss" in last
    profile = last["divergence_by_position"]
    counts = {source: sum(map(sum, profile["counts"][source])) for source in SOURCES}
    assert counts == trainer.ledger.targets
    assert counts["student"] > 0
    assert counts["data"] > 0
    total = sum(sum(map(sum, profile["sums"][source])) for source in SOURCES)
    expected = sum(float(output.divergence.double().sum()) for output, _, _, _ in kept)
    assert abs(total - expected) < 1e-6 * expected
    firsts = [  # the first target of each row, from the micro-batches as they were trained on
        value
        for output, _, places, _ in kept
        for value, place in zip(output.divergence.tolist(), places.tolist(), strict=True)
        if place == 1
    ]
    found = sum(profile["sums"][source][third][0] for source in SOURCES for third in range(3))
    assert abs(found - sum(firsts)) < 1e-6 * sum(firsts)


def test_a_resumed_training_keeps_what_was_counted(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    trainer.train()
    whole = trainer.state.log_history[-1]["divergence_by_position"]
    resumed = trainer_of(tmp_path, max_steps=3, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.log_history[-1]["divergence_by_position"]["counts"] == whole["counts"]
