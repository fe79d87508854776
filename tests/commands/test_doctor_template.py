"""`gkd doctor` on a teacher with a template of its own: both prompts side by side, and what each form costs it."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from tiny import END_OF_TEXT, save_tiny, tiny_model, tiny_rows, tiny_tokenizer

from gkd.assembly.evaluator import Questions, make_evaluator
from gkd.commands.doctor.examine import examine
from gkd.commands.doctor.template import in_both_forms
from gkd.commands.doctor.view import show
from gkd.data.sequences import collate, join, sequence_of
from gkd.data.teacher_view import teacher_view
from gkd.recipe.build import measuring_trainer
from gkd.recipe.capture import capture
from gkd.recipe.rows import recipe_data

PLAIN = (
    "{%- for message in messages -%}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{{ '<|endoftext|>' if message['role'] == 'assistant' }}{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}"
)
RECIPE = """
from gkd.run import dataset_by_name, run

def view(row):
    return {"messages": [{"role": "system", "content": "Be brief."}, *row["messages"][-2:]]}

run(dataset_by_name, defaults={"max_new_tokens": 6, "report_to": "none", "temperature": 1.0}TEACHER_VIEW)
"""


def fitted(rows, tokenizer):
    """A tiny teacher that knows these chats by heart, in its own form."""
    teacher = tiny_model(seed=2, hidden=48)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    ids = [tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))["input_ids"] for row in rows]
    width = max(map(len, ids))
    batch = torch.tensor([row + [256] * (width - len(row)) for row in ids])
    labels = batch.masked_fill(batch == 256, -100)
    for _ in range(60):
        optimizer.zero_grad()
        teacher(batch, attention_mask=(batch != 256).long(), labels=labels).loss.backward()
        optimizer.step()
    return teacher.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rows = tmp_path_factory.mktemp("user"), tiny_rows(12)
    base = tiny_tokenizer(chat_template=PLAIN)
    base.eos_token = END_OF_TEXT
    save_tiny(path / "student", tokenizer=base, seed=1, eos_token_id=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fitted(rows, tiny_tokenizer()).save_pretrained(path / "teacher")
    tiny_tokenizer().save_pretrained(path / "teacher")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "recipe.py").write_text(RECIPE.replace("TEACHER_VIEW", ""))
    (path / "viewed.py").write_text(RECIPE.replace("TEACHER_VIEW", ", teacher_view=view"))
    return path


def recipe_of(folder, name="recipe.py", **changes):
    values = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        **changes,
    }
    return capture(folder / name, [part for key, value in values.items() for part in (f"--{key}", str(value))])


def the(diagnosis, name):
    (check,) = [check for check in diagnosis.checks if check.name == name]
    return check


def test_a_teacher_that_does_not_know_the_students_form_is_told_and_its_own_mends_it(folder):
    found = examine(recipe_of(folder, loss_temperature=1.0))
    check = the(found, "Teacher's template")
    assert check.level == "warning"
    assert "in the student's, which it reads (8 answers): it is worse in the student's form" in check.message
    assert "teacher_template=own" in check.remedy
    assert not any(row.teacher for row in found.rows)

    mended = examine(recipe_of(folder, teacher_template="own"))
    check = the(mended, "Teacher's template")
    assert check.level == "ok"
    assert "in its own template, which it reads; " in check.message
    assert the(mended, "Chat templates").level == "ok"
    assert (
        the(mended, "Stop ids").message == "256 for the student, 258 for the teacher, which has a template of its own"
    )
    assert len(mended.rows) == 3
    for row in mended.rows:
        assert row.pieces[-1] == ("stop", "<|endoftext|>")
        assert row.teacher[-1] == ("stop", "<|im_end|>")
        assert row.teacher[0][1].endswith("<|im_start|>assistant\n")
        assert [piece for kind, piece in row.pieces if kind == "target"] == [
            piece for kind, piece in row.teacher if kind == "target"
        ]


def test_both_prompts_stand_side_by_side_in_colour(folder):
    found = examine(recipe_of(folder, "viewed.py"))
    assert "in 12 of 12 rows the teacher reads a prompt of its own" in the(found, "Teacher's prompts").message
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=120)
    show(found, console)
    text = console.file.getvalue()
    assert text.count("the student reads") == 3
    (line,) = [line for line in text.splitlines() if "Be brief." in line][:1]
    assert "\x1b[36m" in line, "prompts are cyan on both sides"
    assert found.as_json()["rows"][0]["teacher"]


def native_nll(teacher, prompts, answers):
    """-log p of each answer, by the teacher alone, from its own tokenizer's rendering."""
    sums = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = teacher(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
        positions = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        sums.append(-sum(float(logits[p, token]) for p, token in zip(positions, answer, strict=True)))
    return sums


def test_in_its_own_form_the_teacher_scores_its_answers_as_it_does_by_itself(folder):
    """Its answers to prompts that its own tokenizer renders; what the training reads of them; and its -log p."""
    recipe = recipe_of(folder, teacher_template="own", seq_kd="true", lmbda=0.0, max_new_tokens=60)
    data = recipe_data(recipe.load_data, recipe.settings)
    tokenizer = tiny_tokenizer()
    with measuring_trainer(recipe.settings, data) as trainer:
        teacher = trainer.teacher.model
        rows = [sequence_of(row) for row in trainer.train_dataset.sort("row")]
        prompts = [
            tokenizer(tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True))
            for row in data["train"]
        ]
        prompts = [prompt["input_ids"] for prompt in prompts]
        assert [row.teacher_prompt for row in rows] == prompts
        answers = trainer.rollouts["teacher"].generate(prompts, 0)
        assert any(answer[-1] == 258 for answer in answers)
        end_map = trainer.hygiene.end_map
        written = [
            join(row.prompt, answer, "teacher", n, teacher_prompt=row.teacher_prompt, end_map=end_map)
            for n, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ]
        assert all(258 not in row.input_ids for row in written), "the student's side holds nothing of the teacher's"
        batch = teacher_view(collate(written, 256))
        targets = batch["target_ids"].split([row.num_targets for row in written])
        signal = trainer.teacher.score(batch)
        said = signal.head.logits(signal.hidden).double().log_softmax(-1)
        nll = -said.gather(-1, batch["target_ids"][:, None])[:, 0]
        sums = [float(part.sum()) for part in nll.split([len(part) for part in targets])]
        native = native_nll(teacher, prompts, answers)
        assert sums == pytest.approx(native, abs=1e-5)

        evaluator = make_evaluator(trainer, Questions(prompts, [], None))
        own = trainer.encoding["reading"].template(0)
        forms = in_both_forms(trainer, own, evaluator.teacher, data["train"], evaluator.conditions)
        said_by_itself = evaluator.teacher.generate(
            prompts, trainer.rollouts["teacher"].settings, evaluator.conditions
        )
        want = math.fsum(native_nll(teacher, prompts, said_by_itself)) / sum(map(len, said_by_itself))
        assert forms.own.value == pytest.approx(want, abs=1e-5)
        assert forms.student.value > forms.own.value + 0.1
