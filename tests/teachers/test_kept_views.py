"""What is kept of a teacher with prompts of its own is found by what it reads, whatever the student reads."""

import copy

import pytest
from datasets import Dataset
from tiny import save_tiny, tiny_model, tiny_tokenizer
from training import Remember, config, losses
from views import teacher_prompt, viewed_rows

from gkd.rollouts.hf import HFRollout
from gkd.teachers.local import LocalTeacher
from gkd.training.trainer import GKDTrainer

ROWS = viewed_rows(8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("teacher"), seed=2, hidden=48, layers=3)


@pytest.fixture
def asked(monkeypatch):
    """How many rows the teacher itself scored, and answered, since the last look."""
    counts = {"scored": 0, "written": 0}
    score, generate = LocalTeacher.score, HFRollout.generate

    def counted_score(self, batch):
        counts["scored"] += sum(any(label != -100 for label in row[1:]) for row in batch["labels"].tolist())
        return score(self, batch)

    def counted_generate(self, prompts, *args):
        counts["written"] += len(prompts) * (self.source == "teacher")
        return generate(self, prompts, *args)

    monkeypatch.setattr(LocalTeacher, "score", counted_score)
    monkeypatch.setattr(HFRollout, "generate", counted_generate)

    def look():
        found = (counts["scored"], counts["written"])
        counts.update(scored=0, written=0)
        return found

    return look


def run(tmp_path, teacher, rows, **values):
    """One step over all rows, with both stores beside each other."""
    values = {"lmbda": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **values}
    stores = {"teacher_scores_dir": str(tmp_path / "scores"), "teacher_cache_dir": str(tmp_path / "sequences")}
    args = config(tmp_path / "out", teacher_model_name_or_path=teacher, learning_rate=0.0, **stores, **values)
    trainer = GKDTrainer(
        tiny_model(seed=1), args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )
    before = trainer.teacher.loaded
    trainer.train()
    return trainer, before


def changed(number, **columns):
    rows = copy.deepcopy(ROWS)
    rows[number].update(columns)
    return rows


def other_question(number):
    turns = copy.deepcopy(ROWS[number]["messages"])
    turns[-2]["content"] += " Quickly."
    return changed(number, messages=turns)


OTHER = [{"role": "user", "content": "Something else that the teacher alone is told."}]


@pytest.mark.parametrize("seq_kd", [False, True])
def test_another_prompt_of_the_teacher_misses_and_another_of_the_student_hits(tmp_path, teacher, asked, seq_kd):
    first, _ = run(tmp_path, teacher, ROWS, seq_kd=seq_kd)
    assert asked() == (8, 7 * seq_kd)  # rows 3 and 7 ask the teacher the same
    again, loaded = run(tmp_path, teacher, ROWS, seq_kd=seq_kd)
    assert asked() == (0, 0)
    assert not loaded  # all that it has to say is there
    assert losses(again) == losses(first)
    run(tmp_path, teacher, changed(2, teacher_prompt=OTHER), seq_kd=seq_kd)
    assert asked() == (1, 1 * seq_kd)
    run(tmp_path, teacher, changed(0, teacher_system="Be brief."), seq_kd=seq_kd)
    assert asked() == (1, 1 * seq_kd)
    _, loaded = run(tmp_path, teacher, other_question(2), seq_kd=seq_kd)  # row 2's teacher reads what it read
    assert asked() == (0, 0)
    assert not loaded
    run(tmp_path, teacher, other_question(1), seq_kd=seq_kd)  # row 1's reads the question behind a system turn
    assert asked() == (1, 1 * seq_kd)


def test_kept_answers_are_trained_on_behind_the_students_prompt(tmp_path, teacher, asked, monkeypatch):
    memory = Remember(monkeypatch)
    for _ in range(2):
        trainer, _ = run(tmp_path, teacher, ROWS, seq_kd=True)
    assert memory.windows[0] == memory.windows[1]
    for sequence in memory.windows[0]:
        prompt = teacher_prompt(ROWS[sequence.row])
        assert sequence.input_ids[sequence.prompt_length :] == trainer.rollouts["teacher"].store.get(prompt)
        assert sequence.teacher_row()[0][: len(prompt)] == prompt
