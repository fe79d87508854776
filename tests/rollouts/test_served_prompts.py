"""The prompt of a rollout is the prompt that the model is served with, wherever something is written."""

import datetime
import json

import pytest
from datasets import Dataset, load_dataset
from tiny import CHATML, THINKING, save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, config
from transformers import GenerationConfig

import gkd.data.template_day
from gkd.assembly.checks import check_lengths
from gkd.cli import main
from gkd.data.prepare import prepare_dataset
from gkd.data.sequences import prompt_of
from gkd.data.template_day import template_day
from gkd.data.vocabulary import configured_stop_ids
from gkd.models.loading import generation_config_of
from gkd.rollouts.hf import HFRollout
from gkd.run import run
from gkd.teachers.local import LocalTeacher
from gkd.training.trainer import GKDTrainer


def served(row):
    tokenizer = tiny_tokenizer(chat_template=THINKING)
    return tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]


def test_student_and_teacher_write_on_from_the_served_prompt(tmp_path, monkeypatch):
    memory, rows = Remember(monkeypatch), tiny_rows(16)
    trainer = GKDTrainer(
        model=tiny_model(seed=1),
        teacher_model=tiny_model(hidden=48, layers=3, seed=2),
        args=config(tmp_path, lmbda=0.5, seq_kd=True, per_device_train_batch_size=8, eval_strategy="steps"),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
        processing_class=tiny_tokenizer(chat_template=THINKING),
    )
    trainer.train()
    assert {sequence.source for sequence in memory.windows[0]} == {"student", "teacher"}
    for sequence in memory.windows[0]:
        prompt = served(rows[sequence.row])
        assert sequence.input_ids[: sequence.prompt_length] == sequence.prompt == prompt
        assert sequence.labels == [-100] * len(prompt) + sequence.input_ids[len(prompt) :]
    tokenizer = trainer.processing_class
    assert [tokenizer(text)["input_ids"] for text in trainer.eval_dataset["prompt"]] == [served(r) for r in rows[:2]]
    longest = max(len(served(row)) for row in rows)
    trainer.teacher.model.config.max_position_embeddings = longest + 7  # max_new_tokens is 8
    with pytest.raises(ValueError, match=f"the longest prompt, of {longest} tokens"):
        check_lengths(trainer.args, {"teacher": trainer.teacher.model}, trainer.train_dataset)


def test_rows_that_are_prepared_already_keep_their_prompts():
    rows, tokenizer = Dataset.from_list(tiny_rows(3)), tiny_tokenizer(chat_template=THINKING)
    limits = {"max_length": None, "max_prompt_length": None}
    prepared, _ = prepare_dataset(rows, tokenizer, **limits)
    again, _ = prepare_dataset(prepared, tokenizer, **limits)
    assert [prompt_of(row) for row in again] == [prompt_of(row) for row in prepared] == [served(row) for row in rows]
    wrong = prepared.map(lambda row: {"prompt_ids": [999]})
    with pytest.raises(ValueError, match="row 0, column 'prompt_ids': holds the id 999"):
        prepare_dataset(wrong, tokenizer, **limits)


RECIPE = """
from gkd.run import dataset_by_name, run

run(lambda settings: {"train": dataset_by_name(settings)["train"]})
"""


@pytest.fixture
def asked(monkeypatch):
    """The prompts that anybody's `generate` was called with, and how often the teacher scored."""
    prompts, scored, generate, score = [], [], HFRollout.generate, LocalTeacher.score

    def count_prompts(self, given, step, rows=None):
        prompts.extend(given)
        return generate(self, given, step, rows)

    def count_scores(self, batch):
        scored.append(len(batch["input_ids"]))
        return score(self, batch)

    monkeypatch.setattr(HFRollout, "generate", count_prompts)
    monkeypatch.setattr(LocalTeacher, "score", count_scores)
    return prompts, scored


def test_beforehand_and_in_the_table_prompts_are_the_served_ones(tmp_path, asked):
    """What `gkd precompute` writes is what training looks for, and the before/after table starts from it, too."""
    prompts, scored = asked
    tokenizer, rows = tiny_tokenizer(chat_template=THINKING), tiny_rows(6)
    save_tiny(tmp_path / "student", seed=1, tokenizer=tokenizer)
    save_tiny(tmp_path / "teacher", seed=2, tokenizer=tokenizer)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.py").write_text(RECIPE)
    values = {
        "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "teacher_scores_dir": tmp_path / "scores",
        "lmbda": 0.0,
        "seq_kd": "true",
        "max_new_tokens": 6,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "evaluate_before_and_after": "false",
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    expected = sorted(served(row) for row in rows)
    assert main(["precompute", str(tmp_path / "recipe.py"), "--scores", *flags]) == 0
    assert sorted(prompts) == expected
    del prompts[:], scored[:]
    assert (
        main(["precompute", str(tmp_path / "recipe.py"), *flags, "--precompute_output", str(tmp_path / "data")]) == 0
    )
    assert (
        sorted(row["input_ids"][: row["prompt_length"]] for row in load_dataset(str(tmp_path / "data"))["train"])
        == expected
    )
    assert main(["run", str(tmp_path / "recipe.py"), *flags]) == 0
    assert (prompts, scored) == ([], [])  # all of it was there
    flags[flags.index("--evaluate_before_and_after") + 1] = "true"
    run(argv=[*flags, "--output_dir", str(tmp_path / "other"), "--max_steps", "1"])
    assert {tuple(prompt) for prompt in prompts} == {tuple(prompt) for prompt in expected}


# ------------------------------------------------------------------------------------------ the model's stop tokens

# A call ends with a token of its own, as in Llama-3.1 and gpt-oss; the tokenizer's eos is another.
CALLING = CHATML.replace("'<|im_end|>\n'", "('<|endoftext|>' if message.tool_calls else '<|im_end|>\n')").replace(
    "(message['content'] or '')",
    "(message['content'] or '') + (message.tool_calls | tojson if message.tool_calls else '')",
)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "owls"}}}
CALLS = [
    {"messages": [tiny_rows(1)[0]["messages"][0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
] * 4


@pytest.mark.parametrize("by_name", [False, True])
def test_no_second_stop_token_stands_behind_one_of_the_models_own(tmp_path, by_name):
    """The generation config lists both; only there does it say that <|endoftext|> ends an answer."""
    tokenizer, student = tiny_tokenizer(chat_template=CALLING), tiny_model(seed=1)
    student.generation_config = GenerationConfig(eos_token_id=[258, 256])
    if by_name:
        student.save_pretrained(tmp_path / "student")
        tokenizer.save_pretrained(tmp_path / "student")
    trainer = GKDTrainer(
        model=str(tmp_path / "student") if by_name else student,
        teacher_model=tiny_model(hidden=48, layers=3, seed=2),
        args=config(tmp_path),
        train_dataset=Dataset.from_list(CALLS),
        processing_class=tokenizer,
    )
    for row in trainer.train_dataset:
        targets = [label for label in row["labels"] if label != -100]
        assert targets[-1] == 256
        assert 258 not in targets
    assert trainer.stop_ids["student"] == (256, 258)


def test_the_stop_tokens_of_a_name_are_those_that_the_model_would_have(tmp_path):
    model = tiny_model(seed=1)
    model.generation_config = GenerationConfig(eos_token_id=[258, 256])
    model.save_pretrained(tmp_path)
    assert configured_stop_ids(generation_config_of(str(tmp_path))) == (256, 258)
    (tmp_path / "generation_config.json").unlink()
    assert configured_stop_ids(generation_config_of(str(tmp_path))) == (model.config.eos_token_id,)
    assert generation_config_of(str(tmp_path / "nothing")) is None


# -------------------------------------------------------------------------------------------------- today's date

DATED = "{{ '<|im_start|>system\nIt is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML


class Day(datetime.date):
    """A calendar that tests turn."""

    now = datetime.date(2026, 3, 1)

    @classmethod
    def today(cls):
        return cls.now


@pytest.fixture
def calendar(monkeypatch):
    monkeypatch.setattr(gkd.data.template_day, "date", Day)
    monkeypatch.setattr(Day, "now", datetime.date(2026, 3, 1))
    return Day


def test_what_the_teacher_has_answered_is_found_again_on_the_next_day(tmp_path, asked, calendar, caplog):
    prompts, _ = asked
    asked_for = []
    for day in (1, 1, 2):
        calendar.now = datetime.date(2026, 3, day)
        trainer = GKDTrainer(
            model=tiny_model(seed=1),
            teacher_model=tiny_model(hidden=48, layers=3, seed=2),
            args=config(tmp_path, lmbda=0.0, seq_kd=True, max_steps=4),
            train_dataset=Dataset.from_list(tiny_rows(16)),
            processing_class=tiny_tokenizer(chat_template=DATED),
        )
        trainer.train()
        asked_for.append(len(prompts))
        assert "It is 01 Mar 2026" in tiny_tokenizer().decode(trainer.train_dataset[0]["input_ids"])
        assert "strftime_now" in caplog.text
        assert "2026-03-01" in caplog.text
    assert asked_for == [16, 16, 16]


def test_the_day_is_todays_where_nothing_is_kept(tmp_path, calendar, caplog):
    tokenizer = tiny_tokenizer(chat_template=DATED)
    for day in (1, 2):
        calendar.now = datetime.date(2026, 3, day)
        assert template_day(config(tmp_path), tokenizer) == f"2026-03-0{day}"
    assert "date_string" in caplog.text
    scores = config(tmp_path, teacher_scores_dir=str(tmp_path / "scores"))
    assert template_day(scores, tokenizer, write=False) == "2026-03-02"
    assert not (tmp_path / "scores").exists()
    assert template_day(scores, tokenizer) == "2026-03-02"
    calendar.now = datetime.date(2026, 3, 3)
    assert template_day(scores, tokenizer) == "2026-03-02"
    (tmp_path / "scores" / "chat_template_day.txt").write_text("yesterday")
    with pytest.raises(ValueError, match=r"chat_template_day\.txt should hold a day as YYYY-MM-DD, holds 'yesterday'"):
        template_day(scores, tokenizer)
    unknown = tiny_tokenizer(chat_template=DATED.replace("strftime_now('%d %b %Y')", "strftime_now('%d ' ~ '%b')"))
    assert template_day(scores, unknown) is None
    assert "not found again" in caplog.text
    caplog.clear()
    assert template_day(scores, tiny_tokenizer()) is None
    assert not caplog.records
