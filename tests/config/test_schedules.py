"""Fields that follow a schedule: which texts are schedules, and what each step's value is."""

import math
from fractions import Fraction

import pytest

from gkd.config.by_source import own_divergence
from gkd.config.fields import GKDConfig
from gkd.config.schedules import schedule_of
from gkd.recipe.settings import RunArguments, parse


def made(tmp_path, **values):
    return GKDConfig(output_dir=tmp_path, report_to=[], **values)


def line(step, left, right):
    """The straight line through two points, in whole fractions."""
    (a, low), (b, high) = left, right
    return float(Fraction(low) + Fraction(high - low) * Fraction(step - a, b - a))


def test_the_value_of_a_step_is_on_the_line_between_its_knots():
    schedule = schedule_of("lmbda", "0@10 1@30 0.5@50")
    for step in range(70):
        expected = 0 if step < 10 else line(step, (10, 0), (30, 1)) if step < 30 else 0.5
        if 30 <= step < 50:
            expected = line(step, (30, 1.0), (50, 0.5))
        assert schedule.at(step, 70) == pytest.approx(expected, abs=1e-12)
    assert [schedule.at(step, 70) for step in (10, 30, 50)] == [0, 1, 0.5]  # exactly


def test_shares_are_of_the_training_whose_first_step_is_0_and_last_100():
    schedule = schedule_of("lmbda", "0@0% 1@50% 0@100%")
    assert [schedule.at(step, 5) for step in range(5)] == [0, 0.5, 1, 0.5, 0]
    assert schedule.at(0, 1) == 0


def test_a_cosine_leaves_and_arrives_level():
    schedule = schedule_of("beta", "0.2@0 0.8@100 cosine")
    for step in range(0, 101, 7):
        expected = 0.5 - 0.3 * math.cos(math.pi * step / 100)
        assert schedule.at(step, 200) == pytest.approx(expected, abs=1e-12)
    assert schedule.at(1, 200) - 0.2 < 0.1 * (schedule.at(50, 200) - schedule.at(49, 200))


def test_two_values_at_one_place_are_a_jump():
    schedule = schedule_of("lmbda", "0@0 0@100 0.5@100 1@101")
    assert [schedule.at(step, 200) for step in (99, 100, 101)] == [0, 0.5, 1]


def test_tokens_are_whole_and_no_step_leaves_the_range_of_the_knots():
    schedule = schedule_of("max_new_tokens", "16@0 64@9 32@20")
    values = [schedule.at(step, 30) for step in range(30)]
    assert all(isinstance(value, int) for value in values)
    assert (values[0], values[9], max(values), values[-1]) == (16, 64, 64, 32)
    assert values[1] == round(16 + 48 / 9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lmbda": "abc"}, r"lmbda='abc': it should be a number, or values at steps"),
        ({"lmbda": ""}, r"lmbda='': it should be a number"),
        ({"lmbda": "cosine"}, r"lmbda='cosine' names no value"),
        ({"lmbda": "0@0 1"}, r"lmbda='0@0 1': '1' is not a number@place"),
        ({"lmbda": "0@0 x@10"}, r"'x@10' is not a number@place"),
        ({"lmbda": "0@0 1@-3"}, r"'1@-3' is not a number@place"),
        ({"lmbda": "0@0 1@inf"}, r"'1@inf' is not a number@place"),
        ({"lmbda": "0@10 1@5"}, r"its places should rise"),
        ({"lmbda": "0@10 1@50%"}, r"mixes steps and shares"),
        ({"lmbda": "0@0% 1@150%"}, r"'1@150%' is behind the end of the training"),
        ({"lmbda": "0@0 1.5@10"}, r"lmbda=1.5 is out of range \[0, 1\]"),
        ({"temperature": "1@0 -1@10"}, r"temperature=-1.0 is out of range"),
        ({"max_new_tokens": "8@0 9.5@10"}, r"'9.5@10' is not a whole number@place"),
        ({"max_new_tokens": "0@0 8@10"}, r"max_new_tokens=0 is out of range"),
        ({"beta": "0@0 2@10"}, r"beta must be between 0 and 1, got 2"),
        ({"beta": "0.1@0 0.9@10", "divergence": "reverse_kl"}, r"has no effect on divergence='reverse_kl'"),
        ({"beta": "0.1@0 0.9@10", "loss_compile": True}, r"loss_compile=True does not go with beta='0.1@0 0.9@10'"),
        ({"lmbda": 0, "max_new_tokens": "8@0 9@10"}, r"max_new_tokens='8@0 9@10' .*no effect with lmbda=0"),
        ({"seq_kd": True, "temperature": "1@0 0.5@10"}, r"temperature='1@0 0.5@10' .*set teacher_temperature"),
        ({"lmbda": "0@0 0.0@10", "rollout_backend": "vllm", "rollout_server_url": "http://localhost:1"}, r"lmbda=0"),
    ],
)
def test_a_text_that_is_no_schedule_is_refused_in_one_line(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        made(tmp_path, **values)
    assert "\n" not in str(caught.value)


def test_a_schedule_that_never_changes_is_its_number(tmp_path):
    args = made(tmp_path, lmbda="0.25@0 0.25@100%", max_new_tokens="7@0", temperature="1", beta="0.3@5 cosine")
    assert (args.lmbda, args.max_new_tokens, args.temperature, args.beta) == (0.25, 7, 1.0, 0.3)
    assert isinstance(args.max_new_tokens, int)


def test_who_writes_is_asked_of_all_steps(tmp_path):
    warm = made(tmp_path, lmbda="0@0 1@100")
    assert (warm.student_writes, warm.reads_answers, warm.teacher_writes, warm.trains_on_nll_alone) == (1, 1, 0, 0)
    taught = made(tmp_path, lmbda="0@0 1@100", seq_kd=True, seq_kd_loss="nll")
    assert (taught.teacher_writes, taught.reads_answers, taught.trains_on_nll_alone) == (1, 0, 0)
    assert made(tmp_path, max_new_tokens="16@0 64@9 32@20", max_length=256).prompt_limit == 256 - 64


def test_flags_and_yaml_give_schedules_and_numbers(tmp_path):
    flags = ["--lmbda", "0@0% 1@50% cosine", "--max_new_tokens", "32", "--temperature", "0.7", "--beta=0.2@0 0.8@9"]
    args = parse({"output_dir": str(tmp_path)}, flags, RunArguments).training
    assert (args.lmbda, args.max_new_tokens, args.temperature, args.beta) == (flags[1], 32, 0.7, "0.2@0 0.8@9")
    path = tmp_path / "run.yaml"
    path.write_text("lmbda: 0@0 1@300\nmax_new_tokens: 16@0 64@100\ntemperature: 1\n")
    args = parse({"output_dir": str(tmp_path)}, ["--config", str(path)], RunArguments).training
    assert (args.lmbda, args.max_new_tokens, args.temperature) == ("0@0 1@300", "16@0 64@100", 1.0)


def test_a_beta_that_follows_a_schedule_is_not_compiled_and_one_of_a_source_alone_is(tmp_path):
    args = made(tmp_path, beta="0.1@0 0.9@10", divergence="forward_kl", divergence_student="jsd")
    assert not own_divergence(args, "student", 0.3).traceable
    fixed = made(tmp_path, beta="0.1@0 0.9@10", divergence_student="jsd", beta_student=0.4)
    assert own_divergence(fixed, "student", 0.3).traceable
