"""Sample completions during training: the rows of the step itself, on any terminal, in step with the progress bar."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import config, dense_loss, trainer_of
from transformers import GenerationConfig, TrainerCallback
from trl import LogCompletionsCallback

from gkd.common.redact import REDACTED
from gkd.common.text import printable
from gkd.data.sequences import TokenSequence, join
from gkd.recipe.capture import execute_recipe
from gkd.rollouts.hygiene import Hygiene
from gkd.training import completions
from gkd.training.completions import CompletionLog, Sample, pick, samples_table

TOKEN = "hf_" + "aB3dE6gH9" * 4


def sample(source="student", tokens=3, prompt="Why?", completion="So.", end="ended", divergence=0.25):
    return Sample(7, source, prompt, completion, end, tokens, divergence)


class Kept(TrainerCallback):
    """Holds what a step was trained on, before the weights move."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        log = self.trainer.training_log.completions
        self.steps.append((state.global_step + 1, list(log._sequences), log.samples(state.global_step + 1)))


def trained(tmp_path, shown, monkeypatch, **values):
    """A run whose shown samples are collected in `shown`; returns what each step was."""
    monkeypatch.setattr(completions, "print_samples", lambda samples: shown.append(samples))
    kept = Kept()
    kept.trainer = trainer = trainer_of(tmp_path, callbacks=[kept], log_completions=True, **values)
    trainer.train()
    return trainer, kept.steps


# ------------------------------------------------------------------------------------------------- in a training


def test_the_rows_are_those_of_the_step_with_the_divergence_of_the_definition(tmp_path, monkeypatch):
    shown = []
    student, teacher = tiny_model(seed=1), tiny_model(hidden=48, layers=3, seed=2)
    values = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "lmbda": 0.5, "loss_chunk_size": 5}
    _, steps = trained(
        tmp_path, shown, monkeypatch, student=student, teacher=teacher, num_completions_to_print=6, **values
    )
    (rows,) = shown
    ((step, sequences, _),) = steps
    fresh = tiny_model(seed=1)  # as the student was in this step
    expected = sorted(
        (s.source, s.completion_length, round(dense_loss(fresh, teacher, [s]).item(), 5)) for s in sequences
    )
    assert sorted((r.source, r.tokens, round(r.divergence, 5)) for r in rows) == expected
    assert {r.source for r in rows} == {"student", "data"}
    tokenizer = tiny_tokenizer()
    texts = {
        (tokenizer.decode(s.input_ids[: s.prompt_length]), tokenizer.decode(s.input_ids[s.prompt_length :]))
        for s in sequences
    }
    assert {(r.prompt, r.completion) for r in rows} == texts
    assert {r.step for r in rows} == {1} == {step}


@pytest.mark.parametrize(
    ("values", "expected"), [({"log_completions_steps": 2}, [2, 4]), ({"logging_steps": 3}, [3, 5])]
)
def test_every_so_many_steps_or_with_every_log(tmp_path, monkeypatch, values, expected):
    shown = []
    trained(tmp_path, shown, monkeypatch, max_steps=5, **values)
    assert [rows[0].step for rows in shown] == expected


def test_trls_own_callback_works_with_this_trainer(tmp_path):
    """As in the article: eight prompts of the evaluation set, continued at every evaluation."""
    rows = Dataset.from_list(tiny_rows(10, seed=3))
    trainer = trainer_of(tmp_path, eval_dataset=rows, eval_strategy="steps", eval_steps=2, max_steps=4)
    sampling = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.9)
    callback = LogCompletionsCallback(trainer, sampling, num_prompts=8)
    trainer.add_callback(callback)
    trainer.train()
    assert [int(step) for step, _, _ in callback.table] == [2] * 8 + [4] * 8
    messages = rows[0]["messages"]
    prompt = tiny_tokenizer().apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert callback.table[0][1] == callback.table[8][1] == prompt
    assert any(completion for _, _, completion in callback.table)


def test_completions_that_are_not_trained_on_are_shown_as_such(tmp_path, monkeypatch):
    shown = []
    trained(
        tmp_path, shown, monkeypatch, lmbda=1.0, max_new_tokens=2, mask_truncated_completions=True,
        num_completions_to_print=4,
    )  # fmt: skip
    (rows,) = shown
    cut = [row for row in rows if row.end.startswith("cut off")]
    assert cut
    assert all(row.divergence is None and row.end.endswith("not trained on") for row in cut)


def hygiene(cap):
    return lambda: Hygiene({"student": (258,), "teacher": (258,)}, cap)


def test_only_the_main_process_shows(capsys):
    log = CompletionLog(tiny_tokenizer(), hygiene(8), list, number=2)

    class State:
        global_step = 1
        is_world_process_zero = False

    log.open([[join([1], [2, 258], "student", 0)]])
    log.add(torch.tensor([0.5, 0.5]))
    log.on_log(None, State, None, {"loss": 1.0})
    assert capsys.readouterr().out == ""
    State.is_world_process_zero = True
    log.on_log(None, State, None, {"train_runtime": 1.0})
    assert capsys.readouterr().out == ""
    log.on_log(None, State, None, {"loss": 1.0})
    assert "0.500 nats" in capsys.readouterr().out
    log.on_log(None, State, None, {"loss": 1.0})  # the same step again
    assert capsys.readouterr().out == ""


def test_secrets_in_rows_do_not_reach_console_or_loggers():
    tokenizer = tiny_tokenizer()
    log = CompletionLog(tokenizer, hygiene(99), list)
    log.open(
        [
            [
                join(
                    tokenizer(f"use {TOKEN}")["input_ids"],
                    tokenizer(f"ok {TOKEN}")["input_ids"],
                    "student",
                    0,
                )
            ]
        ]
    )
    log.add(torch.zeros(len(tokenizer(f"ok {TOKEN}")["input_ids"])))
    (row,) = log.samples(1)
    assert (row.prompt, row.completion) == (f"use {REDACTED}", f"ok {REDACTED}")


def test_how_a_completion_ends():
    log = CompletionLog(tiny_tokenizer(), hygiene(3), list)
    rows = [
        join([1], [2, 258], "student", 0),
        join([1], [2, 3, 4], "student", 1, truncated=True, train=False),
        join([1], [258], "teacher", 2),
        TokenSequence([1, 5], [-100, 5], 1),
    ]
    log.open([rows[:2], rows[2:]])
    log.add(torch.tensor([0.5, 1.5]))  # the second row is not trained on
    log.add(torch.tensor([3.0, 4.0]))
    samples = log.samples(1)
    assert [row.end for row in samples] == ["ended", "cut off, not trained on", "empty", "no stop token"]
    assert [row.divergence for row in samples] == [1.0, None, 3.0, 4.0]


# ---------------------------------------------------------------------------------------------------- the console


def test_rows_are_shared_out_among_sources_and_spread_over_lengths():
    rows = [sample("student", n) for n in (1, 9, 5, 3, 7)] + [sample("data", n) for n in (40, 20)]
    assert [(r.source, r.tokens) for r in pick(rows, 4)] == [
        ("student", 3),
        ("student", 7),
        ("data", 20),
        ("data", 40),
    ]
    assert [(r.source, r.tokens) for r in pick(rows, 1)] == [("student", 5)]
    assert len(pick(rows, 6)) == 6
    assert len(set(map(id, pick(rows, 99)))) == 7


NASTY = [
    sample(prompt="x" * 500 + "END", completion="first line\nsecond [bold]line[/bold] 日本語 é", end="cut off"),
    sample("teacher", completion="\x1b[2J\x1b[31mred\x07\x00", end="ended, not trained on", divergence=None),
]


@pytest.mark.parametrize("width", [20, 40, 71, 72, 100, 200])
def test_the_table_fits_any_terminal_and_shows_what_there_is(width):
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(samples_table(NASTY, width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    flat = re.sub(r"[\s│]", "", out.getvalue())
    assert "\x1b" not in flat
    assert ("Written by" in out.getvalue()) == (width >= 72)  # else under the completion
    if width >= 71:
        for part in (
            "END",
            "[bold]line[/bold]",
            "日本語",
            r"\x1b[2J\x1b[31mred\x07\x00",
            "cutoff",
            "nottrainedon",
            "0.250nats",
        ):
            assert part in flat, (part, out.getvalue())


def test_printable_keeps_text_and_shows_control_characters():
    assert printable("a é 日\nb") == "a é 日\nb"
    assert printable("a\x1b[0m\r\x9b\u202e") == r"a\x1b[0m\r\x9b\u202e"


# -------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"log_completions_steps": 5}, ["log_completions_steps=5", "log_completions=True"]),
        ({"num_completions_to_print": 2}, ["num_completions_to_print=2", "no effect"]),
        ({"log_completions": True, "log_completions_steps": 0}, ["log_completions_steps=0", "at least 1"]),
        ({"log_completions": True, "num_completions_to_print": -1}, ["num_completions_to_print=-1", "at least 1"]),
    ],
)
def test_a_field_without_effect_or_out_of_range_is_refused(tmp_path, values, parts):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **values)
    assert all(part in str(error.value) for part in parts)


# ----------------------------------------------------------------------------------------------------- the recipe


def test_the_articles_recipe_with_evaluation_shows_completions(tmp_path, monkeypatch, capsys):
    """The whole recipe offline: tiny models, a data set with a train and a test split, `eval_loss` on the way."""
    monkeypatch.chdir(tmp_path)
    for split, seed in (("train", 1), ("test", 2)):
        file = tmp_path / "data" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(12, seed)))
    values = {
        "model_name_or_path": save_tiny(tmp_path / "student"),
        "teacher_model_name_or_path": save_tiny(tmp_path / "teacher", seed=2),
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "log_completions_steps": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_new_tokens": 5,
        "num_eval_prompts": 2,
        "report_to": "none",
        "save_strategy": "no",
    }
    argv = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    execute_recipe(Path(__file__).resolve().parents[2] / "recipes" / "gkd_qwen2.py", argv)
    shown = capsys.readouterr().out
    assert shown.index("Completions of step 2") < shown.index("Student before and after")
    history = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if "eval_loss" in line] == [2]
