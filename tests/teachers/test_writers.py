"""Teachers with other tokens write: from their own prompts, in their own tokens, and their text is trained on."""

import copy

import pytest
import torch
from datasets import Dataset
from other_tokens import other_model, other_tokenizer
from tiny import THINKING, tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, change, config

from gkd.data.rewritten import Rewriting, end_of_answers, text_by
from gkd.rollouts.hf import HFRollout
from gkd.rollouts.hygiene import Hygiene
from gkd.training.trainer import GKDTrainer

OWN, OTHER = tiny_tokenizer(), other_tokenizer()
SETTINGS = {"lmbda": 0.0, "seq_kd": True, "seq_kd_loss": "nll", "max_new_tokens": 12}
STOP = 258


def trainer_of(folder, rows=None, teacher=None, student=None, **values):
    extra = {name: values.pop(name) for name in ("eval_dataset", "teacher_view") if name in values}
    return GKDTrainer(
        model=tiny_model(seed=1) if student is None else student,
        teacher_model=other_model() if teacher is None else teacher,
        args=config(folder, **{**SETTINGS, **values}),
        train_dataset=Dataset.from_list(tiny_rows(8) if rows is None else rows),
        processing_class=tiny_tokenizer(),
        teacher_processing_class=other_tokenizer(),
        **extra,
    )


@pytest.fixture
def asked(monkeypatch):
    """The prompts and completions of every call of the teacher's `generate`."""
    calls, original = [], HFRollout.generate

    def generate(self, prompts, step, *rows):
        written = original(self, prompts, step, *rows)
        if self.source == "teacher":
            calls.append((prompts, written))
        return written

    monkeypatch.setattr(HFRollout, "generate", generate)
    return calls


def rendered(row, tokenizer):
    turns = row["messages"][:-1]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])


def rewriting(most=50):
    return Rewriting(OWN, text_by(OTHER), stop_ids=(1,), end_id=end_of_answers(OWN), most=most)


# ------------------------------------------------------------------------------------------------- one completion


@pytest.mark.parametrize("text", ["the red one", " a 34", "é — 日本語", "", "say <|im_end|> now", "a\n\n b "])
def test_an_answer_is_its_text_in_the_students_tokens(text):
    ids = OTHER(text, add_special_tokens=False).input_ids
    found, ended = rewriting()([*ids, 1])
    assert ended
    assert found[-1] == STOP
    assert OWN.decode(found[:-1]) == text
    assert 256 not in found[:-1], "what looks like a special token is text"
    assert STOP not in found[:-1]
    assert rewriting()(ids) == (found[:-1], False), "what was cut off has no end"


def test_special_tokens_rows_of_no_token_and_half_a_character_are_left_out():
    ids = OTHER("one é", add_special_tokens=False).input_ids
    assert rewriting()([0, *ids, len(OTHER) + 3, 1])[0] == rewriting()([*ids, 1])[0]
    cut, ended = rewriting()(ids[:-1])
    assert (OWN.decode(cut), ended) == ("one ", False)


def test_an_answer_longer_than_the_cap_in_the_students_tokens_is_cut_off():
    ids = OTHER("the red", add_special_tokens=False).input_ids
    assert len(ids) < 5
    found, ended = rewriting(5)([*ids, 1])
    assert (OWN.decode(found), ended) == ("the r", False)
    assert rewriting(8)([*ids, 1]) == ([*OWN("the red").input_ids, STOP], True)


def test_the_end_is_that_of_the_students_rows():
    assert end_of_answers(OWN) == STOP
    assert end_of_answers(tiny_tokenizer(chat_template=None)) == STOP
    assert end_of_answers(tiny_tokenizer(chat_template=THINKING)) == STOP
    plain = tiny_tokenizer(chat_template=None)
    plain.eos_token = "<|endoftext|>"
    assert end_of_answers(plain) == 256


def test_hygiene_goes_by_the_teachers_end():
    """Id 1 ends the teacher's; in the student's tokens it is a letter."""
    hygiene = Hygiene({"student": (STOP,), "teacher": (1,)}, max_new_tokens=5, rewriting=rewriting(5))
    ids = OTHER("a b", add_special_tokens=False).input_ids
    trained, verdict = hygiene.received([*ids, 1], "teacher")
    assert (verdict.ended, verdict.truncated, verdict.empty) == (True, False, False)
    assert hygiene.judge(trained, "teacher") == verdict
    trained, verdict = hygiene.received(ids, "teacher")
    assert (verdict.ended, verdict.truncated) == (False, True), "short, and yet nothing ended it"
    assert hygiene.judge(trained, "teacher") == verdict
    assert hygiene.received([1], "teacher")[1].empty
    assert hygiene.received([9, 1], "student") == ([9, 1], hygiene.judge([9, 1], "student"))
    assert not hygiene.judge([9, 1], "teacher").ended


# ------------------------------------------------------------------------------------------------------ a training


def test_the_teacher_writes_from_its_own_prompts_and_its_text_is_trained_on(tmp_path, asked, monkeypatch):
    rows = tiny_rows(8)
    remembered = Remember(monkeypatch)
    student = tiny_model(seed=1)
    before = copy.deepcopy(student).double()
    trainer = trainer_of(tmp_path, rows, student=student, per_device_train_batch_size=8)
    moved = change(trainer)
    written = {tuple(p): c for prompts, completions in asked for p, c in zip(prompts, completions, strict=True)}
    assert set(written) == {tuple(rendered(row, OTHER)) for row in rows}
    assert all(max(ids) < len(OTHER) for ids in written.values()), "rows of its head without a token are not written"
    assert any(ids[-1] == 1 for ids in written.values())
    total, number = torch.zeros((), dtype=torch.float64), 0
    assert len(remembered.windows[0]) == 8
    for sequence in remembered.windows[0]:
        row = rows[sequence.row]
        answer = written[tuple(rendered(row, OTHER))]
        ended = answer[-1] == 1
        text = OTHER.decode([i for i in answer if i > 1]).rstrip("\ufffd" if not ended else "")
        own = [*OWN(text, split_special_tokens=True).input_ids, *([STOP] if ended else [])]
        assert sequence.input_ids == [*rendered(row, OWN), *own[:12]]
        assert sequence.truncated == (not ended or len(own) > 12)
        assert sequence.labels == [-100] * sequence.prompt_length + own[:12]
        logits = before(input_ids=torch.tensor([sequence.input_ids])).logits[0, :-1]
        targets = torch.tensor(sequence.labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        number += int((targets != -100).sum())
    wanted = torch.autograd.grad(total / number, [p for p in before.parameters() if p.requires_grad])
    wanted = -torch.cat([g.flatten() for g in wanted])
    assert float((moved.double() - wanted).norm() / wanted.norm()) < 1e-4
    assert trainer.teacher_model is not None
    with pytest.raises(ValueError, match=r"another tokenizer .*eval_strategy='no'"):
        trainer.teacher.score({})


def test_what_it_wrote_is_kept_under_its_own_ids_over_runs_and_resumes(tmp_path, asked):
    values = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "teacher_cache_dir": str(tmp_path / "kept")}
    trainer = trainer_of(tmp_path / "a", **values)
    whole = change(trainer)
    store = trainer.rollouts["teacher"].store
    for prompts, completions in asked:
        assert [store.get(prompt) for prompt in prompts] == completions
    assert sum(len(prompts) for prompts, _ in asked) == 8
    asked.clear()
    resumed = trainer_of(tmp_path / "a", **values)
    before = torch.cat([p.detach().flatten().clone() for p in resumed.model.parameters()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    after = torch.cat([p.detach().flatten() for p in resumed.model.parameters()])
    torch.testing.assert_close(after - before, whole)
    assert asked == []


def test_text_rows_are_read_without_a_template_and_ids_are_not_read(tmp_path, asked):
    rows = [{"prompt": f"the red {i}", "completion": "one"} for i in range(4)]
    trainer_of(tmp_path, rows, max_steps=1).train()
    assert sorted(p for prompts, _ in asked for p in prompts) == sorted(OTHER(row["prompt"]).input_ids for row in rows)
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}]
    with pytest.raises(ValueError, match=r"row 0 is token ids, .* column teacher_prompt$"):
        trainer_of(tmp_path / "ids", rows)


def test_a_view_of_the_teachers_is_written_in_its_own_template(tmp_path, asked):
    rows = [{**row, "teacher_system": "Be brief."} for row in tiny_rows(4)]
    trainer_of(tmp_path, rows).train()
    for prompts, _ in asked:
        assert all("[system] Be brief." in OTHER.decode(prompt) for prompt in prompts)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "values", [{"lmbda": 0.5}, {"seq_kd_loss": "divergence"}, {"seq_kd": False, "seq_kd_loss": "divergence"}]
)
def test_what_compares_is_refused_with_the_remedy(tmp_path, values):
    with pytest.raises(ValueError, match=r"different tokenizers.*seq_kd=True, seq_kd_loss='nll', lmbda=0"):
        trainer_of(tmp_path, **values)


def test_an_evaluation_that_compares_is_refused(tmp_path):
    rows = Dataset.from_list(tiny_rows(4))
    with pytest.raises(ValueError, match=r"eval_strategy='steps'.*another tokenizer.*eval_strategy='no'"):
        trainer_of(tmp_path, eval_dataset=rows, eval_strategy="steps", eval_steps=1)
    trainer = trainer_of(tmp_path, eval_dataset=rows)
    with pytest.raises(ValueError, match=r"eval_strategy='no'"):
        trainer.evaluate()


def test_the_end_of_a_turn_needs_no_word_of_the_users(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_end_of_turn='<\|im_end\|>=</s>' has no effect"):
        trainer_of(tmp_path, teacher_template="own", teacher_end_of_turn="<|im_end|>=</s>")
