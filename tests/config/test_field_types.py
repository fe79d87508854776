"""What a value of a field becomes, and the one line that refuses a value of another kind."""

import math

import numpy as np
import pytest

from gkd.config.fields import GKDConfig
from gkd.recipe.settings import RunArguments, parse

# ------------------------------------------------------------------------------------------ what a value becomes


def made(tmp_path, **values):
    return GKDConfig(output_dir=tmp_path, report_to=[], **values)


def test_a_whole_number_is_a_number(tmp_path):
    args = made(
        tmp_path, temperature=2, loss_temperature=np.int64(3), min_p=0, top_p=np.float32(0.5), seq_kd=np.bool_(1)
    )
    assert [type(getattr(args, name)) for name in ("temperature", "loss_temperature", "min_p", "top_p")] == [float] * 4
    assert (args.temperature, args.loss_temperature, args.min_p, args.top_p) == (2.0, 3.0, 0.0, 0.5)
    assert args.seq_kd is True
    assert made(tmp_path, max_new_tokens=np.int32(7)).max_new_tokens == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq_kd": "false"}, r"seq_kd='false': it should be true or false"),
        ({"log_completions": [1]}, r"log_completions=\[1\]: it should be true or false"),
        ({"seq_kd": 1}, r"seq_kd=1: it should be true or false"),
        ({"lmbda": True}, r"lmbda=True: it should be a number"),
        ({"temperature": None}, r"temperature is empty: it should be a number"),
        ({"loss_temperature": "1"}, r"loss_temperature='1': it should be a number"),
        ({"temperature": math.nan}, r"temperature=nan is out of range"),
        ({"max_new_tokens": 8.0}, r"max_new_tokens=8.0: it should be a whole number"),
        ({"teacher_top_k": "4"}, r"teacher_top_k='4': it should be a whole number or none"),
        ({"learning_rate": "1e-4"}, r"learning_rate='1e-4': it should be a number"),
        ({"save_strategy": "sometimes"}, r"save_strategy='sometimes': it should be one of no, steps, epoch"),
        ({"generation_kwargs": {1: 2}}, r"generation_kwargs=\{1: 2\}: its keys should be texts"),
        (
            {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            r"'min_lr_rate' has no effect with lr_scheduler_type='linear'",
        ),
        ({"top_k_tail": "renormalize"}, r"top_k_tail='renormalize' has no effect without teacher_top_k"),
        ({"ce_on_student_tokens": True}, r"ce_on_student_tokens=True has no effect with ce_weight=0"),
    ],
)
def test_another_kind_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature:", "the --config file: temperature is empty: it should be a number"),
        ("num_eval_prompts:", "the --config file: num_eval_prompts is empty"),
        ("lora_r: x", "--lora_r 'x': it should be a whole number"),
        ("seq_kd: [1]", r"the --config file: seq_kd=\[1\]: it should be true or false"),
        ("output_dir: 2024-01-01", "the --config file: output_dir=.*it should be a text"),
    ],
)
def test_yaml_of_another_kind_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse({}, ["--output_dir", "out", "--config", str(tmp_path / "a.yaml")])


def test_yaml_as_people_write_it(tmp_path):
    (tmp_path / "a.yaml").write_text(
        'temperature: 2\nsave_strategy: no\nteacher_cache_dir: off\nseq_kd: "yes"\nlearning_rate: 1e-4\nmin_p:\n'
    )
    args = parse({}, ["--output_dir", "out", "--config", str(tmp_path / "a.yaml")]).training
    assert (args.temperature, args.learning_rate, args.seq_kd, args.min_p) == (2.0, 1e-4, True, None)
    assert args.save_strategy == "no"
    assert args.teacher_cache_folder is None


def test_flags_of_another_kind_are_refused():
    for flag, wanted in (
        ("teacher_top_k", "a whole number or none"),
        ("ce_weight", "a number"),
        ("lr_scheduler_type", ""),
    ):
        with pytest.raises(ValueError, match=f"^--{flag}.*abc.*{wanted}"):
            parse({}, ["--output_dir", "out", f"--{flag}", "abc"])


def test_what_runs_around_the_training_is_looked_at_too():
    with pytest.raises(ValueError, match=r"num_eval_prompts=2.5: it should be a whole number"):
        RunArguments(num_eval_prompts=2.5)
