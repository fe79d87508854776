"""What `gkd precompute` puts together without the student is what the training has."""

import pytest
from accelerate import Accelerator
from datasets import Dataset
from tiny import save_tiny, tiny_rows, tiny_tokenizer
from training import config

from gkd.assembly.materials import Given, loading_options, materials
from gkd.assembly.parts import assemble
from gkd.training.trainer import GKDTrainer


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_without_the_student_the_parts_are_those_of_the_training(lmbda, tmp_path):
    save_tiny(tmp_path / "student", seed=1)
    save_tiny(tmp_path / "teacher", seed=2, vocab=264)  # a shorter head: ids of the student's it cannot read
    student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    args = config(
        tmp_path / "out", lmbda=lmbda, seq_kd=True, temperature=0.7, teacher_model_name_or_path=teacher, top_k=5
    )
    rows = Dataset.from_list(tiny_rows(6))
    trainer = GKDTrainer(model=student, args=args, train_dataset=rows, processing_class=tiny_tokenizer())
    ready = materials(args, Given(student, tokenizer=tiny_tokenizer(), train=rows))
    parts = assemble(ready, Accelerator(cpu=True))
    assert "student" not in parts.rollouts
    assert parts.rollouts["teacher"].settings == trainer.rollouts["teacher"].settings
    assert type(parts.rollouts["teacher"]) is type(trainer.rollouts["teacher"])
    assert parts.stop_ids == trainer.stop_ids
    assert parts.hygiene == trainer.hygiene
    assert parts.loss_settings.shared_vocab == trainer.loss_settings.shared_vocab
    assert ready.train.to_list() == trainer.train_dataset.to_list()


def test_a_students_code_is_trusted_where_the_fields_say_so(tmp_path):
    args = config(tmp_path, trust_remote_code=True)
    assert loading_options(args)["trust_remote_code"]
    args.model_init_kwargs = {"trust_remote_code": False, "revision": "main"}
    assert loading_options(args) == {"trust_remote_code": False, "revision": "main"}
