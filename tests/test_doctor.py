"""`gkd doctor` and `gkd evaluate` on real tiny models: what is found, the exit code, nothing left behind."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tiny import TURN_END, save_tiny, tiny_model, tiny_rows, tiny_tokenizer

from gkd.cli import main
from gkd.doctor import examine
from gkd.doctor_view import show, view
from gkd.recipe import capture

RECIPE = """
from gkd.run import dataset_by_name, run, with_held_out

def load_data(settings):
    return with_held_out(dataset_by_name(settings), 4)

def score(completion, row):
    return float("a" in completion)

run(load_data, defaults={"max_new_tokens": 6, "lmbda": 0.5, "use_peft": True, "report_to": "wandb"}, score=score)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    save_tiny(path / "student", seed=1)
    save_tiny(path / "teacher", seed=2, hidden=48, layers=3)
    write(path / "rows.jsonl", tiny_rows(16))
    (path / "recipe.py").write_text(RECIPE)
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def argv(folder, **changes):
    values = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        "num_eval_prompts": 3,
        **changes,
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [str(folder / "recipe.py"), *flags]


def doctor(folder, **changes):
    recipe, *flags = argv(folder, **changes)
    return examine(capture(recipe, flags))


def found(diagnosis, name):
    return [check for check in diagnosis.checks if check.name == name]


def the(diagnosis, name):
    (check,) = found(diagnosis, name)
    return check


# --------------------------------------------------------------------------------------------------------- doctor


def test_a_sound_recipe_passes_and_leaves_nothing_behind(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *argv(folder), "--json", "--seq_kd", "true", "--push_to_hub"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["passed"]
    levels = {check["name"]: check["level"] for check in out["checks"]}
    quality = {"Perplexity", "Rollouts, student", "Rollouts, teacher"}  # random models: no matter which
    assert (
        set(levels) >= {"Versions", "Devices", "Token maps", "Chat templates", "Formats", "Rows", "Prompts"} | quality
    )
    assert {level for name, level in levels.items() if name not in quality} == {"ok"}
    assert len(out["rows"]) == 3
    assert len(out["rollouts"]) == 8
    assert not list(tmp_path.iterdir())


def test_the_view_marks_prompt_target_and_stop(folder):
    row = doctor(folder).rows[0]
    kinds = [kind for kind, _ in row.pieces]
    assert kinds == ["prompt", "target", "stop"]
    assert row.pieces[0][1].endswith("<|im_start|>assistant\n")
    assert row.pieces[2][1] == TURN_END


def test_the_view_of_several_trained_turns_and_of_text_after_them():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab")["input_ids"] + [258] + tokenizer("cde")["input_ids"]
    row = {"input_ids": ids, "labels": [-100, ids[1], 258, -100, ids[4], -100], "prompt_length": 4, "row": 7}
    shown = view(row, tokenizer, {258})
    assert shown.number == 7
    assert shown.pieces == [
        ("prompt", "a"),
        ("target", "b"),
        ("stop", TURN_END),
        ("prompt", "c"),
        ("target", "d"),
        ("untrained", "e"),
    ]


def test_the_console_shows_every_line_and_remedy(folder):
    diagnosis = doctor(folder)
    diagnosis.add("Something", "warning", "is [odd]", "look at it")  # brackets are no markup
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    show(diagnosis, console)
    text = console.export_text()
    assert all(check.message[:60] in text for check in diagnosis.checks)
    assert "→ look at it" in text
    assert "0 error" in text


def test_a_teacher_with_other_tokens_is_an_error_and_the_exit_code_says_so(folder, tmp_path, capsys):
    path = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (next(t for t, i in vocabulary.items() if i == n) for n in (40, 41))
    vocabulary[first], vocabulary[second] = 41, 40
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["doctor", *argv(folder, teacher_model_name_or_path=path), "--json"]) == 1
    out = json.loads(capsys.readouterr().out)
    (error,) = [check for check in out["checks"] if check["level"] == "error"]
    assert error["name"] == "Token maps"
    assert "40" in error["message"]
    assert out["rollouts"] == []  # no weights were loaded for that


def test_other_templates_stop_ids_and_longer_heads_are_told(folder, tmp_path):
    path = tmp_path / "teacher"
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    save_tiny(path, seed=2, vocab=272, tokenizer=tiny_tokenizer(chat_template=template))
    diagnosis = doctor(folder, teacher_model_name_or_path=path)
    assert the(diagnosis, "Chat templates").level == "warning"
    assert "user: Question" in the(diagnosis, "Chat templates").message
    assert the(diagnosis, "Stop ids").level == "warning"
    assert "259" in the(diagnosis, "Token maps").message
    assert "272" in the(diagnosis, "Token maps").message
    assert diagnosis.passed


def test_a_teacher_that_is_the_student_has_nothing_to_teach(folder, tmp_path):
    shutil.copytree(folder / "student", tmp_path / "copy")
    diagnosis = doctor(folder, teacher_model_name_or_path=tmp_path / "copy", temperature=1.0)
    assert the(diagnosis, "Divergence").level == "warning"
    assert the(diagnosis, "Perplexity").level == "ok"


def test_perplexity_warns_exactly_when_the_teacher_is_worse(folder):
    """Both ways round, against the perplexity computed from full logits."""
    diagnoses = [
        doctor(folder),
        doctor(folder, model_name_or_path=folder / "teacher", teacher_model_name_or_path=folder / "student"),
    ]
    levels = [the(diagnosis, "Perplexity").level for diagnosis in diagnoses]
    assert sorted(levels) == ["ok", "warning"]
    student = perplexity(tiny_model(seed=1), folder)
    assert f"student {student:.3g}" in the(diagnoses[0], "Perplexity").message
    assert levels[0] == ("ok" if perplexity(tiny_model(seed=2, hidden=48, layers=3), folder) <= student else "warning")


def perplexity(model, folder):
    """exp of the mean NLL of the answers, stop token included, in float64, of all train rows."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    train = Dataset.from_list(rows).train_test_split(test_size=1, seed=0)["train"]
    tokenizer, total, number = tiny_tokenizer(), 0.0, 0
    for row in train:
        messages = [{key: turn[key] for key in ("role", "content")} for turn in row["messages"]]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + messages[-1]["content"] + TURN_END)["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids)))
        number += len(ids) - start
    return float(torch.tensor(total / number).exp())


def test_rows_that_are_dropped_cut_or_mixed_are_counted(folder, tmp_path):
    rows = tiny_rows(12)
    for row in rows[:4]:
        row["messages"][-2]["content"] = "long " * 300
    for row in rows[4:8]:
        row["messages"][-1]["content"] = "x" * 900
    held_out = set(Dataset.from_dict({"n": range(12)}).train_test_split(test_size=1, seed=0)["test"]["n"])
    dropped, cut = len(set(range(4)) - held_out), len(set(range(4, 8)) - held_out)
    diagnosis = doctor(folder, dataset_name=write(tmp_path / "rows.jsonl", rows), max_length=400)
    counts, *remarks = found(diagnosis, "Rows")
    assert counts.level == "warning"
    assert counts.message.startswith(f"{11 - dropped} of 11 kept")
    assert [remark.message.partition(":")[0] for remark in remarks] == [f"{dropped} dropped", f"{cut} cut"]


def test_plain_prompts_for_a_chat_model_are_told(folder, tmp_path):
    rows = [{"prompt": f"{n} and one is ", "completion": str(n + 1)} for n in range(8)]
    check = the(doctor(folder, dataset_name=write(tmp_path / "rows.jsonl", rows)), "Formats")
    assert check.level == "warning"
    assert "7 pairs of texts" in check.message


def test_answers_without_a_stop_token_are_told(folder, tmp_path):
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]} for _ in range(6)]
    check = the(doctor(folder, dataset_name=write(tmp_path / "rows.jsonl", rows)), "Stop tokens")
    assert check.level == "warning"
    assert check.message.startswith("5 answers")


def test_broken_rows_and_missing_files_are_errors_without_a_trace(folder, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", [*tiny_rows(3), {"messages": [{"role": "user"}]}])
    (check,) = [c for c in doctor(folder, dataset_name=rows).checks if c.level == "error"]
    assert "messages" in check.message
    assert not doctor(folder, dataset_name=tmp_path / "none.jsonl").passed
    assert not doctor(folder, model_name_or_path=tmp_path / "none").passed
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(tmp_path / "none.py")])
    assert stopped.value.code == 2
    assert "no recipe" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_student_and_teacher(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *argv(folder), "--json", "--eval_strategy", "steps"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert set(out["models"]) == {"student", "teacher"}
    assert out["models"]["teacher"]["divergence_own"]["value"] == pytest.approx(0, abs=1e-6)
    assert out["models"]["student"]["divergence_own"]["value"] > 0.01
    assert {"perplexity", "score_greedy", "score_sampled", "ended"} <= set(out["models"]["student"])
    assert not list(tmp_path.iterdir())
    assert main(["evaluate", *argv(folder)]) == 0
    assert "Student and teacher" in capsys.readouterr().out


def test_evaluate_an_adapter_beside_the_student(folder, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(seed=1), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert main(["evaluate", *argv(folder), "--adapter", str(tmp_path / "adapter"), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert list(out["models"]) == ["student", "student + adapter", "teacher"]
    values = [out["models"][name]["divergence_own"]["value"] for name in out["models"]]
    assert len(set(values)) == 3
    assert out["comparison"]["rows"]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *argv(folder), "--adapter", str(folder / "student")])
    assert stopped.value.code == 2
    assert "--model_name_or_path" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "new", "doctor", "evaluate", "precompute"])
def test_help_fits_a_screen_and_ends_with_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-2] == "example:"
    assert lines[-1].startswith(f"  gkd {command} ")
