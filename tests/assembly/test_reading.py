"""Where the teacher's own template comes from, and what is done about one that is not there."""

import logging

import pytest
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from prepared import GOOD
from tiny import CHATML, END_OF_TEXT, THINKING, TURN_END, save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import config
from vllm_server.fake import FakeServer

from gkd.assembly.materials import Given, materials
from gkd.assembly.parts import LoadedStudent, assemble
from gkd.training.trainer import GKDTrainer

OTHER = CHATML.replace("<|im_end|>", "<|endoftext|>")
ROWS = Dataset.from_list(tiny_rows(6))


def base_tokenizer(template=OTHER):
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def ready_for(folder, teacher, rows=ROWS, teacher_tokenizer=None, view=None, **values):
    args = config(folder, **{"teacher_template": "own", **values})
    student = tiny_model(seed=1, eos_token_id=256)
    given = Given(student, teacher, base_tokenizer(), rows, teacher_tokenizer=teacher_tokenizer, teacher_view=view)
    return materials(args, given)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "teacher", seed=2)
    return str(folder / "teacher")


def test_the_template_is_found_by_the_teachers_name(saved, tmp_path):
    ready = ready_for(tmp_path, saved)
    assert ready.end_map == (256, 258)
    assert ready.tokenizer_of(0).chat_template == CHATML
    given = ready_for(tmp_path, tiny_model(seed=2), teacher_tokenizer=tiny_tokenizer())
    assert given.train.to_list() == ready.train.to_list()
    parts = assemble(given, Accelerator(cpu=True), LoadedStudent(given.student, lambda: given.student))
    assert parts.end_map == (256, 258)
    assert parts.stop_ids["teacher"] == (258,)


def test_a_teacher_over_the_students_base_has_the_template_that_its_files_have(saved, tmp_path):
    """The student's tokenizer has been given another (chat_template_path)."""
    args = config(tmp_path, share_base_model=True, teacher_template="own")
    ready = materials(args, Given(saved, None, base_tokenizer(), ROWS))
    assert ready.end_map == (256, 258)
    assert len(set(map(tuple, ready.train["teacher_context"]))) > 1


def test_a_server_says_under_which_name_its_template_is_found(saved, tmp_path):
    values = {"teacher_top_k": 4, "lmbda": 0.0, "max_length": 200}
    with FakeServer(tiny_model(seed=2), tiny_tokenizer(), root=saved) as server:
        ready = ready_for(tmp_path, None, teacher_server_url=server.url, **values)
        parts = assemble(ready, Accelerator(cpu=True), LoadedStudent(ready.student, lambda: ready.student))
    assert parts.end_map == (256, 258)
    assert 258 in parts.stop_ids["teacher"]
    with (
        FakeServer(tiny_model(seed=2), tiny_tokenizer()) as server,
        pytest.raises(ValueError, match=r"needs the teacher's tokenizer: .*'tiny/base' cannot be loaded"),
    ):
        ready_for(tmp_path, None, teacher_server_url=server.url, **values)


def test_an_adapters_own_template_comes_before_its_models(saved, tmp_path):
    adapter = tmp_path / "adapter"
    get_peft_model(tiny_model(seed=2), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    values = {"teacher_adapter_name_or_path": str(adapter)}
    config_file = adapter / "adapter_config.json"
    config_file.write_text(
        config_file.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{saved}"')
    )
    assert ready_for(tmp_path, saved, **values).tokenizer_of(0).chat_template == CHATML
    tiny_tokenizer(chat_template=THINKING).save_pretrained(adapter)
    assert ready_for(tmp_path, saved, **values).tokenizer_of(0).chat_template == THINKING


def test_the_same_template_is_told_to_change_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "gkd"):
        ready = ready_for(tmp_path, tiny_model(seed=2), teacher_tokenizer=base_tokenizer())
    assert "teacher_template='own' changes nothing" in caplog.text
    assert ready.end_map is None
    assert "teacher_context" not in ready.train.column_names


@pytest.mark.parametrize(
    ("teacher", "values", "message"),
    [
        (tiny_model(seed=2), {}, "needs the teacher's tokenizer, and the teacher has no name: pass"),
        (tiny_model(seed=2), {"teacher_tokenizer": tiny_tokenizer(chat_template=None)}, "has no chat template"),
        (
            tiny_model(seed=2),
            {"teacher_tokenizer": tiny_tokenizer(), "teacher_end_of_turn": "x"},
            "teacher_end_of_turn='x' does not name two tokens",
        ),
    ],
)
def test_what_is_missing_is_named(teacher, values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ready_for(tmp_path, teacher, **values)


def test_a_pair_that_is_said_without_a_template_of_its_own_has_no_effect(tmp_path):
    with pytest.raises(ValueError, match="teacher_end_of_turn='a=b' has no effect with teacher_template='student'"):
        config(tmp_path, teacher_end_of_turn="a=b")
    with pytest.raises(ValueError, match="teacher_template='mine' is unknown: use one of student, own"):
        config(tmp_path, teacher_template="mine")


def test_a_collator_of_the_users_own_does_not_say_what_the_teacher_reads(tmp_path):
    for values in ({"teacher_template": "own"}, {}):
        with pytest.raises(ValueError, match="do not go with a data_collator of your own"):
            GKDTrainer(
                model=tiny_model(seed=1),
                teacher_model=tiny_model(seed=2),
                args=config(tmp_path, **values),
                data_collator=lambda rows: rows,
                train_dataset=ROWS,
                processing_class=base_tokenizer(),
                teacher_processing_class=tiny_tokenizer(),
                teacher_view=lambda row: row,
            )


def test_a_trainer_reads_train_and_evaluation_rows_by_the_function(tmp_path):
    def view(row):
        return {"messages": [{"role": "system", "content": row["hint"]}, *row["messages"]]}

    rows = Dataset.from_list([{**GOOD, "hint": "H"}] * 4)
    trainer = GKDTrainer(
        model=tiny_model(seed=1),
        teacher_model=tiny_model(seed=2),
        args=config(tmp_path),
        train_dataset=rows,
        eval_dataset={"a": rows},
        processing_class=tiny_tokenizer(),
        teacher_view=view,
    )
    late = trainer.late_rows.ready(rows, "late")
    for found in (trainer.train_dataset, trainer.eval_dataset["a"], late):
        text = trainer.processing_class.decode(found["teacher_context"][0])
        assert text.startswith(f"<|im_start|>system\nH{TURN_END}")
