"""Sequences that do not fit into a model's positions: refused before the first step, and only those."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from training import logged, trainer_of
from transformers import AutoConfig

from gkd.assembly.checks import check_views
from gkd.data.prepare import prepare_dataset
from gkd.models.facts import position_limit

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def rows(prompt, answer, number=8):
    """Rows of token ids: `prompt` ids of context, `answer` targets."""
    ids = list(range(1, prompt + answer + 1))
    return Dataset.from_list([{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}] * number)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("qwen2", {"max_position_embeddings": 64}, (64, True)),
        ("gpt2", {"n_positions": 64}, (64, True)),
        ("opt", {"max_position_embeddings": 64}, (64, True)),
        ("qwen2", {"max_position_embeddings": 64, "rope_parameters": YARN}, (64, False)),
        ("falcon", {"max_position_embeddings": 64, "alibi": True}, (64, False)),
        ("bloom", {}, (None, True)),
        ("mamba", {}, (None, True)),
    ],
)
def test_what_a_config_says_of_positions(kind, values, expected):
    assert position_limit(AutoConfig.for_model(kind, **values)) == expected


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_rollout_that_does_not_fit_is_refused_at_once(who, tmp_path):
    short = {who: tiny_model(seed=3, max_position_embeddings=40)}
    trainer_of(tmp_path, rows(30, 5), lmbda=1.0, max_new_tokens=10, **short)  # 40 of 40
    with pytest.raises(ValueError, match=rf"max_new_tokens=11: .*30 tokens.*41.*the {who} has 40 positions.*lower"):
        trainer_of(tmp_path, rows(30, 5), lmbda=1.0, max_new_tokens=11, **short)


def test_a_data_row_that_does_not_fit_is_refused(tmp_path):
    short = tiny_model(seed=3, max_position_embeddings=40)
    trainer_of(tmp_path, rows(10, 30), student=short, lmbda=0.0)
    with pytest.raises(ValueError, match=r"max_length=256: the longest row has 41 tokens.*set max_length=40"):
        trainer_of(tmp_path, rows(10, 31), student=short, lmbda=0.0)
    trainer_of(tmp_path, rows(10, 31), student=short, lmbda=1.0)  # its answer is not read


def test_fields_that_allow_more_are_no_matter_when_the_rows_are_short(tmp_path):
    short = tiny_model(seed=3, max_position_embeddings=40)
    trainer = trainer_of(tmp_path, rows(10, 5), student=short, lmbda=0.5, max_length=None, max_new_tokens=8)
    trainer.train()
    assert len(logged(trainer, "loss")) == 1


def test_stretched_positions_are_told_and_go_on(tmp_path, caplog):
    student = tiny_model(seed=3, max_position_embeddings=64, rope_parameters=YARN)
    trainer = trainer_of(tmp_path, rows(60, 5), student=student, lmbda=1.0, max_new_tokens=10)
    assert any("the student has 64 positions" in record.getMessage() for record in caplog.records)
    trainer.train()
    assert logged(trainer, "rollout/length_max") == [10]  # 60 + 10 positions of 64


def test_a_model_without_that_field_is_left_alone(tmp_path):
    trainer_of(tmp_path, rows(60, 5), student=tiny_model("bloom", seed=3), lmbda=1.0, max_new_tokens=10)


def viewed(context, prompt=5, answer=5):
    """Rows of which the teacher reads a longer prompt."""
    return rows(prompt, answer).add_column("teacher_context", [list(range(1, context + 1))] * 8)


@pytest.mark.parametrize("seq_kd", [False, True])
def test_a_prompt_of_the_teachers_own_is_held_to_the_teachers_positions(seq_kd, tmp_path):
    short = tiny_model(seed=3, max_position_embeddings=40)
    values = {"teacher": short, "lmbda": 0.0, "seq_kd": seq_kd, "max_new_tokens": 5}
    trainer_of(tmp_path, viewed(35), **values)  # 40 of 40
    with pytest.raises(ValueError, match="up to 41 tokens, and it has 40 positions"):
        trainer_of(tmp_path, viewed(36), **values)


def test_rows_of_the_evaluation_are_held_to_them_too(tmp_path):
    short = tiny_model(seed=3, max_position_embeddings=40)
    values = {"teacher": short, "lmbda": 0.0, "eval_strategy": "steps"}
    trainer_of(tmp_path, rows(5, 5), eval_dataset=viewed(35), **values)
    with pytest.raises(
        ValueError, match=r"the teacher reads up to 41 tokens, and it has 40 positions .*: give it shorter"
    ):
        trainer_of(tmp_path, rows(5, 5), eval_dataset={"a": rows(5, 5), "b": viewed(36)}, **values)


def test_a_server_that_takes_less_says_with_what_it_should_be_started(tmp_path):
    served = SimpleNamespace(served=SimpleNamespace(max_model_len=46))
    args = trainer_of(tmp_path, rows(5, 5)).args  # lmbda=0.5, max_new_tokens=8
    ready, _ = prepare_dataset(viewed(38), tiny_tokenizer(), max_length=None, max_prompt_length=None)
    with pytest.raises(ValueError, match=r"reads up to 46 tokens.*max_model_len=46: start it with --max-model-len 47"):
        check_views(args, ready, [], None, served)
    served.served.max_model_len = 47
    check_views(args, ready, [], None, served)
