"""What a window of rollouts is judged by, beside values worked out by hand."""

import pytest

from gkd.data.sequences import TokenSequence, join
from gkd.rollouts.hygiene import Hygiene
from gkd.training.health import COUNTS, SIZE, Health, count_rollouts

N = len(COUNTS)
SOUND = [10, 100, 1, 0, 0, 1]  # rows, tokens, truncated, empty, repetitive, unsound


def counts(own, reference=None, student=0.0, teacher=0.0, targets=0):
    entropies = [round(1e6 * targets * value) for value in (student, teacher)]
    return [*own, *(reference or [0] * N), *entropies, targets]


def judged(health, **options):
    return {one.name: one for one in health.judge(0.5, options.get("cap_changes", False))}


def test_a_share_fires_half_of_the_way_from_where_it_should_be():
    health = Health()
    for _ in range(5):
        health.add(counts(SOUND, [10, 120, 2, 0, 0, 2]), 5)
    found = judged(health)["truncated"]
    assert (found.value, found.limit, found.calm) == (0.1, pytest.approx(0.6), pytest.approx(0.4))  # reference 0.2
    for share in (0.1, 0.24, 0.38, 0.52, 0.66):
        found = judged(health)["truncated"]
        assert (found.value, found.fires) == (pytest.approx(share), share > 0.6)
        health.add(counts([10, 160, 8, 0, 0, 8], [10, 120, 2, 0, 0, 2]), 5)
    found = judged(health)["truncated"]
    assert found.value == 0.8
    assert found.fires


def test_where_all_is_cut_off_from_the_start_nothing_fires_until_it_was_better():
    health = Health()
    bad, good = [20, 160, 20, 0, 0, 20], [20, 100, 1, 0, 0, 1]
    for _ in range(6):
        health.add(counts(bad), 5)
    assert not judged(health)["truncated"].fires
    for _ in range(5):
        health.add(counts(good), 5)
    assert not judged(health)["truncated"].fires
    for _ in range(4):
        health.add(counts(bad), 5)
        last = judged(health)["truncated"]
    assert last.fires  # beside its best window, 0.05


def test_lengths_are_judged_beside_the_reference_and_the_start():
    health = Health()
    health.add(counts([16, 16 * 8, 0, 0, 0, 0], [16, 16 * 20, 0, 0, 0, 0]), 1)
    found = judged(health)
    assert (found["short"].limit, found["long"].limit) == (4.0, 80.0)  # min(20 / 4, 8 / 2), max(4 * 20, 2 * 8)
    health.add(counts([16, 16 * 3, 0, 0, 0, 0], [16, 16 * 20, 0, 0, 0, 0]), 1)
    assert (judged(health)["short"].fires, judged(health)["long"].fires) == (True, False)
    alone = Health()
    alone.add(counts([16, 16 * 8, 0, 0, 0, 0]), 1)
    assert {"short", "long"}.isdisjoint(judged(alone))


def test_entropy_is_judged_beside_the_teachers_on_the_same_tokens():
    health = Health()
    for step, (student, teacher) in enumerate([(2.0, 1.5), (2.0, 1.5), (0.1, 1.5), (0.05, 0.1)]):
        health.add(counts([20, 100, 0, 0, 0, 0], student=student, teacher=teacher, targets=100), 1)
        # entropies are of the step before: of this one they come with the next
        health.add(counts([20, 100, 0, 0, 0, 0], student=student, teacher=teacher, targets=100), 2)
        health.steps = health.steps[-2:-1]
        assert judged(health)["entropy"].fires == (step == 2), step


def test_a_window_reaches_back_until_it_holds_enough_rollouts():
    health = Health()
    for step in range(7):
        health.add(counts([2, 10, 0, 0, 0, 0]), 3)
        assert not health.judge(0.5, False), step
    health.add(counts([2, 10, 0, 0, 0, 0]), 3)
    assert health.judge(0.5, False)
    health.add(counts([0, 0, 0, 0, 0, 0]), 3)
    assert len(health.steps) == 8
    health.add(counts([16, 80, 0, 0, 0, 0]), 3)
    assert [step[0] for step in health.steps] == [2, 2, 16]


def test_with_a_cap_that_changes_only_the_same_steps_are_compared():
    health = Health()
    health.add(counts([20, 100, 0, 0, 0, 0], [20, 100, 0, 0, 0, 0]), 1)
    health.add(counts([20, 100, 18, 0, 0, 18], [20, 100, 18, 0, 0, 18]), 1)  # the cap fell
    assert "unsound" not in judged(health, cap_changes=True)
    assert not judged(health, cap_changes=True)["truncated"].fires
    health.add(counts([20, 100, 18, 0, 0, 18], [20, 100, 2, 0, 0, 2]), 1)
    assert judged(health, cap_changes=True)["truncated"].fires


def test_rollouts_are_counted_beside_the_answers_to_the_same_prompts():
    hygiene = Hygiene({"student": (9,), "teacher": (9,)}, 5)
    answers = [[1, 2, 9], [1, 2, 3, 4, 5, 6, 9], [], [4, 9]]
    rows = [TokenSequence([7, 7, *a, 8], [-100, -100, *a, -100], 2, row=i) for i, a in enumerate(answers)]
    written = [
        join([7, 7], [1, 2, 3, 4, 5], "student", 0, truncated=True),
        join([7, 7], [9], "student", 1),
        join([7, 7], [3, 9], "student", 2),
        rows[3],
    ]
    verdicts = [hygiene.judge(one.input_ids[one.prompt_length :], one.source) for one in written]
    found = count_rollouts(rows, written, verdicts, hygiene, teacher_writes=False)
    assert found[:N] == [3, 8, 1, 1, 0, 2]
    assert found[N:] == [2, 8, 1, 0, 0, 1]  # the second answer would have been cut off after 5 tokens
    assert len(found) + 3 == SIZE
    taught = [*written[:3], join([7, 7], [1, 9], "teacher", 3)]
    assert count_rollouts(rows, taught, verdicts, hygiene, teacher_writes=True)[N:] == [1, 2, 0, 0, 0, 0]
