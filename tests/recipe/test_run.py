"""Recipes as users run them: flags, YAML, defaults, and wrong use answered in one line with the remedy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from user import flags

from gkd.recipe.command_line import RENAMED
from gkd.recipe.settings import parse
from gkd.run import run

ROOT = Path(__file__).resolve().parents[2]


def fails(argv, capsys, **options):
    with pytest.raises(SystemExit) as stopped:
        run(argv=argv, **options)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# -------------------------------------------------------------------------------------------- a run, end to end


def test_the_articles_command_line(folder, tmp_path):
    """The command of the article with this file in place of examples/scripts/gkd.py, on small local models."""
    command = [
        sys.executable,
        "recipes/gkd_qwen2.py",
        *flags(folder, tmp_path / "out", dataset_name=folder / "rows.jsonl"),
    ]
    command += ["--learning_rate", "2e-4", "--gradient_accumulation_steps", "8", "--num_train_epochs", "1"]
    command += ["--gradient_checkpointing", "--use_peft", "--lora_r", "64", "--lora_alpha", "16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.startswith("train data set: "), done.stderr  # no library tells of itself before
    assert not [line for line in done.stderr.splitlines() if "it/s" in line or "%|" in line]  # no bars in a log
    out = tmp_path / "out"
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (64, 16)
    card = (out / "README.md").read_text()
    for part in ("2306.13649", "lmbda", "target tokens", "gkd_qwen2.py", "![", "library_name: peft"):
        assert part.lower() in card.lower(), part
    assert str(folder) not in card.split("How it was trained")[0]  # a path of this machine is no repository
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert {"divergence_own", "divergence_teacher_text", "ended"} <= {row["key"] for row in evaluation["rows"]}
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/student" in entry and "time/rollout" in entry for entry in history)
    assert list((out / "plots").glob("*.png"))
    assert "Student before and after" in done.stdout
    from peft import PeftModel

    PeftModel.from_pretrained(tiny_model(seed=1), out)


def test_full_fine_tuning_through_the_runner(folder, tmp_path):
    run(argv=flags(folder, tmp_path, lmbda=1.0, evaluate_before_and_after="false"))
    assert (tmp_path / "model.safetensors").is_file()
    assert "library_name: transformers" in (tmp_path / "README.md").read_text()


# ------------------------------------------------------------------------------------ flags, YAML and defaults


def test_precedence_of_flag_yaml_recipe_and_field(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"beta": 0.25, "learning_rate": "3e-4", "lmbda": 0.75, "output_dir": "from_yaml"}))
    defaults = {"beta": 0.1, "lmbda": 0.1, "max_new_tokens": 77, "output_dir": "from_recipe"}
    settings = parse(defaults, ["--config", str(file), "--lmbda", "0.3"])
    args = settings.training
    assert (args.lmbda, args.beta, args.learning_rate) == (0.3, 0.25, 3e-4)
    assert (args.max_new_tokens, args.temperature, args.output_dir) == (77, 0.9, "from_yaml")


def test_callable_defaults_are_called_only_when_needed():
    called = []

    def model():
        called.append(1)
        return "made"

    assert parse({"model_name_or_path": model}, ["--model_name_or_path", "given"]).model.model_name_or_path == "given"
    assert not called
    assert parse({"model_name_or_path": model}, []).model.model_name_or_path == "made"


def test_every_field_of_ours_is_a_flag():
    import dataclasses

    from trl import SFTConfig

    from gkd.config.fields import GKDConfig

    own = {f.name for f in dataclasses.fields(GKDConfig)} - {f.name for f in dataclasses.fields(SFTConfig)}
    assert {"lmbda", "beta", "seq_kd", "mixing", "loss_temperature", "top_p", "overlong_prompt"} <= own
    values = {"teacher_model_init_kwargs": '{"dtype": "bfloat16"}', "generation_kwargs": '{"no_repeat_ngram_size": 3}'}
    argv = [part for name, value in values.items() for part in (f"--{name}", value)]
    args = parse({}, argv).training
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert args.generation_kwargs == {"no_repeat_ngram_size": 3}


@pytest.mark.parametrize("argv", [["--lmda", "0.3"], ["--learning_rat", "1"], ["--temp", "1"]])
def test_unknown_flags_are_errors_and_nothing_is_abbreviated(argv, capsys):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        parse({}, argv)
    assert argv[0] in str(stopped.value) + capsys.readouterr().err


@pytest.mark.parametrize("name", RENAMED)
def test_a_fields_name_elsewhere_leads_to_ours(name, tmp_path):
    with pytest.raises(ValueError, match=rf"no field '--{name}'; did you mean --{RENAMED[name]}\?"):
        parse({}, [f"--{name}", "1", "--output_dir", str(tmp_path)])


def test_unknown_keys_in_yaml_and_in_defaults_are_errors(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lmda: 0.3\n")
    with pytest.raises(ValueError, match="lmda"):
        parse({}, ["--config", str(file)])
    with pytest.raises(ValueError, match="lmda"):
        parse({"lmda": 0.3}, [])
    with pytest.raises(ValueError, match="no such file"):
        parse({}, ["--config", str(tmp_path / "none.yaml")])


# ------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"lmbda": 1.5}, ["lmbda=1.5", "[0, 1]"]),
        ({"beta": -0.1}, ["beta", "-0.1"]),
        ({"divergence": "kl"}, ["divergence='kl'", "forward_kl"]),
        ({"skew_lambda": 0.3}, ["skew_lambda=0.3", "no effect"]),
        ({"packing": "true"}, ["packing=True", "no effect"]),
        ({"max_length": 1}, ["max_length=1 leaves no room"]),
        ({"teacher_model_name_or_path": None}, ["no teacher", "teacher_model_name_or_path"]),
        ({"model_name_or_path": None}, ["model_name_or_path is missing"]),
        ({"dataset_name": "nowhere/rows.jsonl"}, ["nowhere/rows.jsonl"]),
        ({"dataset_name": None}, ["dataset_name is missing"]),
        ({"teacher_model_name_or_path": "nowhere/teacher"}, ["nowhere/teacher"]),
        ({"generation_kwargs": '{"num_beans": 3}'}, ["num_beans"]),
        ({"resume_from_checkpoint": "nowhere", "model_name_or_path": "not/loaded"}, ["nowhere", "no such folder"]),
        ({"optim": "galore_adamw"}, ["optim='galore_adamw' cannot be made", "galore_torch"]),
        ({"optim_args": "beta"}, ["optim_args='beta'"]),
        ({"use_liger_kernel": "true"}, ["use_liger_kernel", "pip install"]),
        ({"attn_implementation": "flash_attention_2"}, ["teacher_model_name_or_path", "FlashAttention2"]),
    ],
)
def test_wrong_values_name_field_value_and_remedy(folder, tmp_path, capsys, changes, parts):
    message = fails(flags(folder, tmp_path, **changes), capsys)
    for part in parts:
        assert part in message


def test_wrong_data_names_row_or_line(folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"

    def message(text, **changes):
        rows.write_text(text)
        return fails(flags(folder, tmp_path / "out", dataset_name=rows, **changes), capsys)

    assert "empty" in message("")
    assert "line 2" in message('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    only_prompts = '{"prompt": "a ", "completion": "b"}\n{"prompt": "a "}\n{"prompt": "c "}\n'
    told = message(only_prompts, lmbda=0.5)
    assert all(part in told for part in ("2 of the 3 rows", "lmbda=1", "seq_kd"))
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    told = message(good + '{"messages": [{"role": "user"}]}\n')
    assert "row 1" in told
    assert "messages" in told


def test_a_teacher_with_other_tokens_is_refused(folder, tmp_path, capsys):
    """Even of equal size: ids 0 and 1 stand for each other."""
    path = tmp_path / "teacher"
    save_tiny(path, seed=2)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (next(t for t, i in vocabulary.items() if i == n) for n in (40, 41))
    vocabulary[first], vocabulary[second] = 41, 40
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = fails(flags(folder, tmp_path / "out", teacher_model_name_or_path=path), capsys)
    assert "40" in told
    assert repr(first) in told or first in told


def test_a_longer_padded_head_trains_and_is_told(folder, tmp_path, caplog):
    path = tmp_path / "teacher"
    save_tiny(path, seed=2, vocab=272)
    run(argv=flags(folder, tmp_path / "out", teacher_model_name_or_path=path, evaluate_before_and_after="false"))
    assert any("259" in r.getMessage() and "272" in r.getMessage() for r in caplog.records)


def test_debug_shows_the_traceback(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GKD_DEBUG", "1")
    with pytest.raises(ValueError, match="lmbda"):
        run(argv=flags(folder, tmp_path, lmbda=2))


def test_cli(tmp_path, capsys):
    from gkd.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["run", str(tmp_path / "none.py")])
    assert stopped.value.code == 2
    assert "no recipe" in capsys.readouterr().err
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import sys, pathlib\npathlib.Path(sys.argv[2]).write_text(__name__)\n")
    with pytest.raises(SystemExit) as stopped:  # it calls no run, after it was executed as a program
        main(["run", str(recipe), "--write", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "does not call" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "__main__"


def test_missing_arguments_of_the_trainer_are_filled_in_or_named(folder, tmp_path, monkeypatch):
    from datasets import Dataset

    from gkd.config.fields import GKDConfig
    from gkd.training.trainer import GKDTrainer

    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list(tiny_rows(4))
    trainer = GKDTrainer(str(folder / "student"), str(folder / "teacher"), train_dataset=rows)
    assert trainer.args.lmbda == 0.5
    assert trainer.args.output_dir == "student-GKD"
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(ValueError, match="teacher_model_name_or_path"):
        GKDTrainer(str(folder / "student"), train_dataset=rows)
    with pytest.raises(ValueError, match="model is missing"):
        GKDTrainer(teacher_model=str(folder / "teacher"), train_dataset=rows)
    with pytest.raises(ValueError, match="processing_class is missing"):
        GKDTrainer(tiny_model(), tiny_model(seed=2), train_dataset=rows)
    given = {"dtype": torch.bfloat16}
    args = GKDConfig("out", teacher_model_name_or_path=str(folder / "teacher"), teacher_model_init_kwargs=given)
    trainer = GKDTrainer(str(folder / "student"), args=args, train_dataset=rows)
    assert trainer.teacher_model.dtype == torch.bfloat16
    assert args.teacher_model_init_kwargs == given == {"dtype": torch.bfloat16}
    args = GKDConfig("out", teacher_model_init_kwargs={"attn_implementation": "eager"})
    assert GKDTrainer(str(folder / "student"), str(folder / "teacher"), args, train_dataset=rows).teacher_model
    with pytest.raises(ValueError, match="already a model"):
        GKDTrainer(str(folder / "student"), tiny_model(), args, train_dataset=rows)


@pytest.mark.parametrize("while_training", ["no", "steps"])
def test_the_table_has_the_perplexity_of_held_out_answers_also_without_evaluation_while_training(
    folder, tmp_path, while_training
):
    """Oracle: the answers' own log-likelihood, row by row, of the student as it is."""
    import math

    from datasets import Dataset

    rows = [{"prompt": f"count {n}:", "completion": " " + "ab " * n} for n in range(1, 7)]
    rows.append({"prompt": "no answer", "completion": None})
    data = {"train": Dataset.from_list(rows[:6]), "eval": Dataset.from_list(rows[2:])}
    if while_training == "steps":
        data["eval"] = data["eval"].select(range(4))  # eval_loss needs answers
    argv = flags(folder, tmp_path, dataset_name=None, eval_strategy=while_training, max_steps=1)
    run(lambda settings: data, argv=argv)
    table = {row["key"]: row for row in json.loads((tmp_path / "evaluation.json").read_text())["rows"]}
    model, tokenizer = tiny_model(seed=1), tiny_tokenizer()
    total, number = 0.0, 0
    for row in rows[2:6]:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        start = len(tokenizer(row["prompt"])["input_ids"])
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))
        number += len(ids) - start
    assert table["perplexity"]["before"]["value"] == pytest.approx(math.exp(total / number), rel=1e-4)
    assert table["perplexity"]["before"]["count"] == 4


RECIPE = {
    "log_completions": True,
    "log_completions_steps": 50,
    "beta": 0.9,
    "seq_kd": True,
    "teacher_temperature": 0.5,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "optim": "adamw_torch",
    "optim_args": "fused=false",
    "max_steps": 100,
    "teacher_top_k": 64,
    "top_k_tail": "renormalize",
    "ce_weight": 0.5,
    "ce_on_student_tokens": True,
    "rollout_backend": "vllm",
    "rollout_server_url": "http://a",
    "rollout_staleness": 1,
    "rollout_batch_size": 4,
    "teacher_model_name_or_path": "teacher",
    "teacher_model_init_kwargs": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"log_completions_steps": 50, "beta": 0.9, "teacher_temperature": 0.5}),
        (["--log_completions", "false"], {"log_completions_steps": None, "beta": 0.9}),
        (["--log_completions=false"], {"log_completions_steps": None}),
        (["--log_completions", "1"], {"log_completions_steps": 50}),
        (["--log_completions"], {"log_completions_steps": 50}),
        (["--divergence", "forward_kl"], {"divergence": "forward_kl", "beta": 0.5, "teacher_temperature": 0.5}),
        (["--divergence", "jsd"], {"beta": 0.9}),
        (["--seq_kd", "false"], {"teacher_temperature": None, "beta": 0.9}),
        (["--lr_scheduler_type", "cosine"], {"lr_scheduler_kwargs": None}),
        (["--lr_scheduler_type", "cosine_with_min_lr"], {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        (["--optim", "sgd"], {"optim_args": None}),
        (["--num_train_epochs", "3"], {"max_steps": -1, "num_train_epochs": 3}),  # else it would have no effect
        (["--max_steps", "7"], {"max_steps": 7}),
        (["--teacher_top_k", "none"], {"teacher_top_k": None, "top_k_tail": "bucket"}),
        (["--teacher_top_k", "8"], {"teacher_top_k": 8, "top_k_tail": "renormalize"}),
        (["--ce_weight", "0"], {"ce_on_student_tokens": False}),
        (["--lmbda", "0"], {"rollout_batch_size": 4}),  # the teacher still writes
        (["--lmbda", "0.0", "--seq_kd", "no"], {"rollout_batch_size": None}),
        (["--rollout_backend", "hf"], {"rollout_server_url": None, "rollout_staleness": 0}),
        (["--lmbda=0"], {"rollout_backend": "hf", "rollout_server_url": None, "rollout_staleness": 0}),
        (
            ["--teacher_server_url", "http://b", "--teacher_top_k", "8"],
            {"teacher_server_url": "http://b", "teacher_model_name_or_path": None, "teacher_model_init_kwargs": None},
        ),
        (["--share_base_model"], {"teacher_model_name_or_path": None, "teacher_model_init_kwargs": None}),
    ],
)
def test_what_goes_with_a_value_of_the_recipe_goes_when_that_is_changed(argv, expected, tmp_path):
    args = parse(RECIPE, ["--output_dir", "out", *argv]).training
    assert {name: getattr(args, name) for name in expected} == expected
    file = tmp_path / "my.yaml"
    file.write_text("seq_kd: false\n")
    assert parse(RECIPE, ["--output_dir", "out", "--config", str(file)]).training.teacher_temperature is None


def test_what_is_set_aside_is_told():
    settings = parse(RECIPE, ["--output_dir", "out", "--lr_scheduler_type", "linear"])
    assert settings.remarks == [
        "lr_scheduler_type=linear: the recipe's lr_scheduler_kwargs={'min_lr_rate': 0.1} is set aside"
    ]
    assert parse(RECIPE, ["--output_dir", "out"]).remarks == []


def test_several_loggers_from_the_command_line(monkeypatch):
    for argv in (
        ["--report_to", "wandb", "tensorboard", "--max_steps", "3"],
        ["--max_steps=3", "--report_to", "wandb"],
    ):
        training = parse({}, ["--output_dir", "out", *argv]).training
        assert training.report_to == [arg for arg in argv if arg in ("wandb", "tensorboard")]
        assert training.max_steps == 3
    assert parse({"report_to": "none"}, ["--output_dir", "out"]).training.report_to == []


def test_the_arguments_of_a_notebooks_kernel_are_not_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "/run/kernel-1.json"])
    assert parse({"output_dir": str(tmp_path), "lmbda": 0.25}).training.lmbda == 0.25
    monkeypatch.setattr(sys, "argv", ["recipe.py", "-f", "x"])
    with pytest.raises(ValueError, match=r"no field '-f'"):
        parse({"output_dir": str(tmp_path)})


def test_what_the_user_gives_is_refused_where_it_has_no_effect_never_set_aside():
    argv = ["--output_dir", "out", "--divergence", "forward_kl", "--beta", "0.9"]
    with pytest.raises(ValueError, match=r"beta=0.9 has no effect"):
        parse(RECIPE, argv)
