"""The prompt of a rollout is the prompt that the model is served with, wherever something is written."""

import json

import pytest
from datasets import Dataset, load_dataset
from test_trainer import Remember
from tiny import CHATML, save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import config

from gkd import GKDTrainer
from gkd.cli import main
from gkd.lengths import check_lengths
from gkd.rollouts import HFRollout
from gkd.run import run
from gkd.teachers import LocalTeacher

# A thinking model's template: it is served "<think>\n" to go on from, and leaves the thoughts of an answer out.
THINKING = CHATML.replace("(message['content'] or '')", "message['content'].split('</think>')[-1]").replace(
    "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"
)


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
