"""Fields about the guard against collapse that would do nothing, or could not do what they say."""

import pytest

from gkd.config.fields import GKDConfig

SAVING = {"save_strategy": "steps", "save_steps": 1}


def made(tmp_path, **values):
    return GKDConfig(output_dir=tmp_path, report_to=[], **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"collapse_guard": "maybe"}, r"collapse_guard='maybe' is unknown: use one of off, warn"),
        ({"collapse_guard": "warn", "lmbda": 0}, r"collapse_guard='warn' has no effect with lmbda=0"),
        ({"collapse_window": 9}, r"collapse_window=9 has no effect with collapse_guard=off"),
        ({"collapse_threshold": 0.4}, r"collapse_threshold=0.4 has no effect with collapse_guard=off"),
        ({"collapse_guard": "warn", "collapse_window": 0}, r"collapse_window=0 is out of range"),
        ({"collapse_guard": "warn", "collapse_threshold": 0}, r"collapse_threshold=0.0 is out of range \(0, 1\]"),
        ({"collapse_guard": "rollback", "save_strategy": "no"}, r"'rollback' needs checkpoints to go back to"),
        ({"collapse_guard": "rollback", **SAVING, "save_only_model": True}, r"save_only_model=True"),
        (
            {
                "collapse_guard": "rollback",
                **SAVING,
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "eval_strategy": "steps",
                "eval_steps": 1,
            },
            r"halves the learning rate, which lr_scheduler_type",
        ),
        ({"lmbda": "auto", "mixing": "batch"}, r"lmbda=auto does not go with mixing='batch'"),
        (
            {
                "lmbda": "auto",
                "rollout_backend": "vllm",
                "rollout_server_url": "http://localhost:1",
                "rollout_staleness": 1,
            },
            r"lmbda=auto changes the student's share .*set rollout_staleness=0",
        ),
    ],
)
def test_what_has_no_effect_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        made(tmp_path, **values)
    assert "\n" not in str(caught.value)


def test_a_guard_that_lowers_the_share_makes_room_for_others(tmp_path):
    assert not made(tmp_path, lmbda=1.0, collapse_guard="stop").reads_answers
    lowered = made(tmp_path, lmbda=1.0, collapse_guard="lower_lmbda")
    assert (lowered.student_writes, lowered.reads_answers) == (True, True)
    assert made(tmp_path, lmbda=1.0, collapse_guard="lower_lmbda", seq_kd=True).teacher_writes
    auto = made(tmp_path, lmbda="auto", collapse_window=3)
    assert (auto.student_writes, auto.reads_answers) == (True, True)


def test_yaml_reads_off_as_false(tmp_path):
    assert made(tmp_path, collapse_guard=False).collapse_guard == "off"
