"""Flags over YAML over a recipe's defaults, and what of these goes with a value that is changed: no run is started."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig

from gkd.config.fields import GKDConfig
from gkd.config.values import INEFFECTIVE
from gkd.recipe.set_aside import flag_values, set_aside
from gkd.recipe.settings import DataArguments, RunArguments, parse


def test_flag_over_yaml_over_recipe_over_field(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lmbda: 0.3\nmax_new_tokens: 9\nnum_eval_prompts: 3\n")
    recipe = {"output_dir": str(tmp_path), "lmbda": 0.1, "max_new_tokens": 5, "temperature": 0.7}
    settings = parse(recipe, ["--config", str(file), "--lmbda", "0.9"])
    training = settings.training
    assert (training.lmbda, training.max_new_tokens, training.temperature) == (0.9, 9, 0.7)
    assert settings.run.num_eval_prompts == 3
    assert parse({"output_dir": str(tmp_path)}, []).training.lmbda == 0.5


def test_a_default_that_is_made_is_made_only_where_nobody_gives_the_field(tmp_path):
    made = []
    recipe = {"output_dir": str(tmp_path), "model_name_or_path": lambda: made.append(1) or "made"}
    assert parse(recipe, ["--model_name_or_path", "mine"]).model.model_name_or_path == "mine"
    assert made == []
    assert parse(recipe, []).model.model_name_or_path == "made"


@pytest.mark.parametrize(
    ("recipe", "argv", "yaml", "message"),
    [
        ({}, ["--lmda", "0.5"], "", r"lmda.*lmbda"),
        ({"lmda": 0.5}, [], "", r"the recipe's defaults"),
        ({}, [], "lmda: 0.5", r"the --config file"),
        ({}, ["--lmbda", "2"], "", r"lmbda=2"),
        ({}, ["--num_eval_prompts", "0"], "", r"num_eval_prompts=0 .*evaluate_before_and_after=False"),
        ({}, ["--lm_eval_limit", "3"], "", r"lm_eval_limit=3"),
        ({}, [], "lmbda: 0.1\nseed: 3\nlmbda: 0.9", r"run.yaml: lmbda stands twice, in lines 1 and 3"),
        ({}, ["--lora_r", "8"], "", r"lora_r=8 has no effect with use_peft=False: add --use_peft"),
        ({"lora_r": 64}, [], "use_dora: true", r"use_dora=True has no effect with use_peft=False"),
        ({}, ["--use_peft", "--use_bnb_nested_quant"], "", r"use_bnb_nested_quant=True .* load_in_4bit=False"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path, recipe, argv, yaml, message):
    (tmp_path / "run.yaml").write_text(yaml or "seed: 3\n")
    with pytest.raises(ValueError, match=message):
        parse({"output_dir": str(tmp_path), **recipe}, ["--config", str(tmp_path / "run.yaml"), *argv])


def test_a_recipes_values_may_wait_for_the_field_that_they_need(tmp_path):
    recipe = {"output_dir": str(tmp_path), "lora_r": 64, "lora_target_modules": ["all-linear"]}
    assert parse(recipe, []).model.lora_r == parse(recipe, ["--use_peft"]).model.lora_r == 64
    assert parse(recipe, ["--use_peft", "--lora_r", "8"]).model.lora_r == 8


def test_help_is_grouped_with_our_own_fields_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse({"lmbda": 0.25}, ["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^(\w.*):$", text, flags=re.MULTILINE) == [
        "options",
        "distillation, of gkd (docs/fields.md)",
        "measured before and after, of gkd",
        "rows, of TRL; datasets of gkd",
        "the student and its adapter, of TRL",
        "training, of TRL",
        "training, of transformers",
    ]
    names = re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)
    kinds = (TrainingArguments, SFTConfig, GKDConfig, ModelConfig, DataArguments, RunArguments)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}
    assert len(names) == len(set(names))
    assert set(names) == fields - {*INEFFECTIVE, "ignore_bias_buffers"}
    own = [field.name for field in dataclasses.fields(GKDConfig) if field.name not in SFTConfig.__dataclass_fields__]
    assert names[: len(own)] == own
    assert names.index("num_eval_prompts") < names.index("dataset_name")
    assert not [line for line in text.splitlines() if len(line) > 80 and not line.startswith("usage")]
    assert re.search(r"--lmbda VALUE .*?\(default: 0.25\)", text, flags=re.DOTALL)


def test_flags_as_values():
    argv = ["--a", "1", "--b=x=y", "--on", "--with-dash", "d", "--no_bf16", "--list", "p", "q"]
    values = flag_values(argv)
    assert {name: values[name] for name in ("a", "b", "on", "with_dash", "bf16", "list")} == {
        "a": "1", "b": "x=y", "on": "true", "with_dash": "d", "bf16": "false", "list": "p",
    }  # fmt: skip


OWN = {"lmbda": 0.5, "seq_kd": False, "rollout_backend": "hf", "divergence": "jsd", "max_steps": -1}


@pytest.mark.parametrize(
    ("recipe", "given", "gone"),
    [
        ({"beta": 0.1}, {"divergence": "forward_kl"}, {"beta"}),
        ({"beta": 0.1}, {"divergence": "jsd"}, set()),  # the value that it had
        ({"beta": 0.1}, {"divergence": "skew_forward_kl", "beta": "0.2"}, set()),  # given: never set aside
        ({"max_steps": 50}, {"num_train_epochs": "3"}, {"max_steps"}),
        ({"ce_weight": 1.0, "ce_on_student_tokens": True}, {"ce_weight": "0"}, {"ce_on_student_tokens"}),
        ({"ce_weight": 1.0, "ce_on_student_tokens": True}, {"ce_weight": "0.5"}, set()),
        ({"rollout_batch_size": 4}, {"lmbda": "0"}, {"rollout_batch_size"}),  # nothing is generated here
        ({"rollout_batch_size": 4, "seq_kd": True}, {"lmbda": "0"}, set()),  # the teacher writes here
        ({"seq_kd": True, "rollout_batch_size": 4, "rollout_backend": "vllm"}, {"lmbda": "1"}, {"rollout_batch_size"}),
        ({"rollout_backend": "vllm", "rollout_server_url": "u", "server_proxy": "p"}, {"rollout_backend": "hf"},
         {"rollout_server_url", "server_proxy"}),
        ({"rollout_backend": "vllm", "server_proxy": "p", "teacher_server_url": "t"}, {"rollout_backend": "hf"},
         set()),
        ({"teacher_scores_dir": "s"}, {"lmbda": "1"}, {"teacher_scores_dir"}),
        ({"teacher_scores_dir": "s"}, {"lmbda": "0.9"}, set()),
    ],
)  # fmt: skip
def test_followers_go_when_their_leader_is_changed(recipe, given, gone):
    kept, remarks = set_aside(recipe, OWN, given)
    assert set(recipe) - set(kept) == gone
    assert kept == {name: value for name, value in recipe.items() if name not in gone}
    assert len(remarks) == len(gone)
    for name in gone:
        assert any(f"the recipe's {name}={recipe[name]} is set aside" in remark for remark in remarks)
