"""A training whose teacher reads another prompt than the student, against two dense forward passes in float64."""

import pytest
import torch
from datasets import Dataset
from tiny import CHATML, END_OF_TEXT, tiny_model, tiny_tokenizer
from training import Remember, config, logged, losses, trainer_of
from transformers import TrainerCallback
from views import dense_loss, gradient, own_prompt, relative, teacher_prompt, viewed_rows

from gkd.loss.registry import DIVERGENCES
from gkd.training.trainer import GKDTrainer

ROWS = viewed_rows(20)
STEP = {"per_device_train_batch_size": 20, "learning_rate": 0.0, "teacher_cache_dir": "off"}


def student_model(**values):
    """So small weights that fp32 itself is within 1e-6 of float64."""
    return tiny_model(seed=1, initializer_range=0.1, **values)


def teacher_model():
    return tiny_model(hidden=48, layers=3, seed=2)


class Gradients(TrainerCallback):
    """The gradient of each step, before it is taken."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))


def trained(folder, monkeypatch, rows=ROWS, **values):
    """One step over all rows: the trainer, its gradient, and the window as it was trained on."""
    memory, gradients = Remember(monkeypatch), Gradients()
    values = {**STEP, "student": student_model(), "teacher": teacher_model(), **values}
    trainer = trainer_of(folder, Dataset.from_list(rows), callbacks=[gradients], **values)
    trainer.train()
    return trainer, gradients.steps[0], memory.windows[0]


def check(trainer, found, window, name="jsd", end_map=None):
    student, teacher = student_model().double(), teacher_model().double()
    wanted = dense_loss(student, teacher, window, ROWS, name, end_map)
    assert losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-6)
    bound = 3e-6 if name == "total_variation" else 1e-6  # whose gradient takes signs
    assert relative(found, gradient(wanted, student)) < bound


def test_loss_and_gradient_of_every_divergence(tmp_path, monkeypatch):
    for name in DIVERGENCES:
        trainer, found, window = trained(tmp_path, monkeypatch, divergence=name, lmbda=0.5)
        assert {sequence.source for sequence in window} == {"data", "student"}
        assert sum(sequence.has_view for sequence in window) == 15
        check(trainer, found, window, name)


@pytest.mark.parametrize(("batch", "accumulation"), [(20, 1), (10, 2), (5, 4)])
def test_however_a_step_is_cut_and_whoever_writes(tmp_path, monkeypatch, batch, accumulation):
    trainer, found, window = trained(
        tmp_path, monkeypatch, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        lmbda=0.5, seq_kd=True,
    )  # fmt: skip
    assert {sequence.source for sequence in window} == {"teacher", "student"}
    check(trainer, found, window)
    targets = sum(sequence.num_targets for sequence in window)
    assert logged(trainer, "ledger/targets/student")[0] + logged(trainer, "ledger/targets/teacher")[0] == targets


def test_an_offloaded_teacher_scores_the_whole_window_in_its_own_view(tmp_path, monkeypatch):
    trainer, found, window = trained(
        tmp_path, monkeypatch, per_device_train_batch_size=5, gradient_accumulation_steps=4,
        teacher_placement="cpu_offload", lmbda=0.5,
    )  # fmt: skip
    check(trainer, found, window)


def test_equal_prompts_are_a_training_without_views_bit_for_bit(tmp_path, monkeypatch):
    """Columns that say what the student reads anyway, or nothing."""
    plain = [{"messages": row["messages"]} for row in ROWS]
    said = [{**row, "teacher_prompt": row["messages"][:-1], "teacher_system": None} for row in plain]
    empty = [{**row, "teacher_prompt": None, "teacher_system": None} for row in plain]
    results = [trained(tmp_path, monkeypatch, rows, lmbda=0.5, seq_kd=True) for rows in (plain, said, empty)]
    for trainer, found, window in results[1:]:
        assert window == results[0][2]
        assert torch.equal(found, results[0][1])
        assert losses(trainer) == losses(results[0][0])


def test_the_teacher_writes_from_its_own_prompt(tmp_path, monkeypatch):
    trainer, _, window = trained(tmp_path, monkeypatch, lmbda=0.0, seq_kd=True, teacher_temperature=0.0)
    teacher = trainer.teacher_model
    for sequence in window[:8]:
        prompt = teacher_prompt(ROWS[sequence.row])
        written = sequence.input_ids[sequence.prompt_length :]
        ids = [*prompt, *written]
        assert teacher(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == written
        assert sequence.input_ids[: sequence.prompt_length] == own_prompt(ROWS[sequence.row])


def test_an_evaluation_reads_the_teachers_view(tmp_path):
    trainer = trainer_of(
        tmp_path, eval_dataset=Dataset.from_list(ROWS), per_device_eval_batch_size=7, lmbda=0.0,
        student=student_model(), teacher=teacher_model(),
    )  # fmt: skip
    sequences = trainer.data_collator.sequences(list(trainer.eval_dataset))
    student, teacher = student_model().double(), teacher_model().double()
    wanted = dense_loss(student, teacher, sequences, ROWS).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)


# ----------------------------------------------------------------------------------------- a template of its own

STUDENT_END, TEACHER_END = 256, 258


def with_own_template(folder, **values):
    """The student's turns end with <|endoftext|>, the teacher's with <|im_end|>."""
    own = tiny_tokenizer(chat_template=CHATML.replace("<|im_end|>", END_OF_TEXT))
    own.eos_token = END_OF_TEXT
    values = {**STEP, "teacher_template": "own", "max_new_tokens": 60, **values}
    gradients = Gradients()
    trainer = GKDTrainer(
        student_model(eos_token_id=STUDENT_END),
        teacher_model(),
        config(folder, **values),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=own,
        teacher_processing_class=tiny_tokenizer(),
        callbacks=[gradients],
    )
    return trainer, gradients


@pytest.mark.parametrize(("lmbda", "seq_kd"), [(0.0, False), (0.4, True)])
def test_two_tokens_that_end_a_turn_stand_for_each_other(tmp_path, monkeypatch, lmbda, seq_kd):
    memory = Remember(monkeypatch)
    trainer, gradients = with_own_template(tmp_path, lmbda=lmbda, seq_kd=seq_kd)
    assert trainer.hygiene.end_map == (STUDENT_END, TEACHER_END)
    trainer.train()
    (window,) = memory.windows
    check(trainer, gradients.steps[0], window, end_map=(STUDENT_END, TEACHER_END))
    by_others = [sequence for sequence in window if sequence.source != "student"]
    ended = [sequence for sequence in by_others if sequence.input_ids[-1] == STUDENT_END]
    assert ended if seq_kd else len(ended) == 20
    source = by_others[0].source
    assert logged(trainer, f"rollout/ended/{source}")[0] == pytest.approx(len(ended) / len(by_others), abs=1e-3)
    assert not any(TEACHER_END in sequence.input_ids[sequence.prompt_length :] for sequence in ended)
