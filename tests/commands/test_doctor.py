"""`gkd doctor` and `gkd evaluate` on real tiny models: what is found, the exit code, nothing left behind."""

import copy
import io
import json
import re
import shutil
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from rich.text import Text
from tiny import TURN_END, save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from vllm_server.fake import FakeServer

import gkd.commands.doctor.examine
import gkd.commands.doctor.models
from gkd.cli import main
from gkd.commands.doctor.cost import examine_schedules, timed_steps
from gkd.commands.doctor.examine import examine
from gkd.commands.doctor.view import Diagnosis, Reader, show, view
from gkd.commands.evaluate import evaluate_recipe
from gkd.common.text import rough_duration
from gkd.evaluation.measures import Estimate, Measures
from gkd.recipe.capture import capture
from gkd.servers import client as vllm_client

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
    sound = {
        "Versions",
        "Devices",
        "Token maps",
        "Chat templates",
        "Formats",
        "Rows",
        "Held out",
        "Prompts",
        "Stop tokens",
    }
    assert set(levels) == sound | quality | {"Tokenizers", "Memory", "Models", "Stop ids", "Divergence", "Time"}
    assert all(set(check) == {"name", "level", "message", "remedy"} for check in out["checks"])
    assert {level for name, level in levels.items() if name not in quality} == {"ok"}
    assert len(out["rows"]) == 3
    assert len(out["rollouts"]) == 8
    assert not list(tmp_path.iterdir())


def test_a_look_leaves_the_users_settings_as_they_are(folder):
    recipe, *flags = argv(folder, rollout_staleness=0, output_dir="mine", log_completions="true")
    looked_at = capture(recipe, [*flags, "--push_to_hub"])
    parts = (looked_at.settings.training, looked_at.settings.model)
    before = copy.deepcopy([{f.name: getattr(part, f.name) for f in fields(part)} for part in parts])
    assert examine(looked_at).passed
    evaluate_recipe(looked_at, None)
    assert [{f.name: getattr(part, f.name) for f in fields(part)} for part in parts] == before


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
    shown = view(row, Reader(tokenizer, {258}))
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


def test_duplicates_and_held_out_prompts_that_are_trained_on_are_counted(folder, tmp_path):
    rows = tiny_rows(16)
    assert (
        the(doctor(folder), "Held out").message
        == "0 duplicates among 15 train rows; 0 of 1 held-out prompts are in train"
    )
    again = {"messages": [*rows[1]["messages"][:-1], {"role": "assistant", "content": "another answer"}]}
    data = write(tmp_path / "rows.jsonl", [*rows, rows[0], rows[0], again])
    check = the(doctor(folder, dataset_name=data), "Held out")
    assert (check.level, check.message.split(";")[1]) == ("warning", " 0 of 1 held-out prompts are in train")
    assert "2 duplicates among 18" in check.message
    # A recipe that brings its own held-out rows: two of three are trained on.
    (tmp_path / "own.py").write_text(
        "import json\nfrom datasets import Dataset\nfrom gkd.run import dataset_by_name, run\n\n"
        "def load_data(settings):\n    train = dataset_by_name(settings)['train']\n"
        "    held_out = Dataset.from_list([train[0], train[1], {'messages': [{'role': 'user', 'content': 'new'}]}])\n"
        "    return {'train': train, 'prompts': held_out}\n\nrun(load_data, defaults={'max_new_tokens': 6})\n"
    )
    check = the(examine(capture(tmp_path / "own.py", argv(folder)[1:])), "Held out")
    assert (check.level, check.message.split(";")[1]) == ("warning", " 2 of 3 held-out prompts are in train")
    assert "hold_out" in check.remedy


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


def test_colours_are_for_a_terminal(folder):
    diagnosis = doctor(folder)
    texts = {}
    for terminal in (True, False):
        file = io.StringIO()
        colours = "standard" if terminal else "auto"  # what a pipe gets
        show(diagnosis, Console(file=file, force_terminal=terminal or None, width=200, color_system=colours))
        texts[terminal] = file.getvalue()
    assert "\x1b[36m" in texts[True]  # the prompt in cyan
    assert "\x1b[1;37;41m" in texts[True]  # the stop token, white on red
    assert "\x1b" not in texts[False]
    # In a file, or with NO_COLOR, brackets say what the colours would.
    assert "marks:  prompt  ⟦target⟧  ⟪stop⟫  ⟨untrained⟩" in texts[False]
    assert texts[False].count(f"⟪{TURN_END}⟫") == 3
    assert not set("⟦⟪⟨") & set(texts[True])
    plain, unmarked = Text.from_ansi(texts[True]).plain, texts[False].translate(dict.fromkeys(map(ord, "⟦⟧⟪⟫⟨⟩")))
    words = [re.sub(r"[\s│─╮╭╰╯]", "", text) for text in (plain, unmarked)]
    assert words[0].replace("colours:", "marks:") == words[1]
    no_colour = io.StringIO()
    show(diagnosis, Console(file=no_colour, force_terminal=True, width=200, no_color=True))
    assert f"⟪{TURN_END}⟫" in Text.from_ansi(no_colour.getvalue()).plain


def test_findings_are_printed_as_soon_as_they_are_known(folder, monkeypatch):
    """A check that ends everything is below those that were made before it."""
    file = io.StringIO()
    known = {}

    def attempt(out, name, action, original=gkd.commands.doctor.examine.attempt):
        known[name] = file.getvalue()
        return original(out, name, action)

    for file_of in ("examine", "models"):
        monkeypatch.setattr(f"gkd.commands.doctor.{file_of}.attempt", attempt)
    recipe, *flags = argv(folder)
    examine(capture(recipe, flags), Console(file=file, width=100))
    assert "Token maps" in known["Rows"]
    assert "row 0" in known["Models"]
    assert "Rollouts of the student" not in known["Rollouts"]
    assert "Rollouts of the student" in known["Time"]


def test_earlier_turns_that_are_not_trained_on_are_told(folder, tmp_path):
    rows = [{"messages": [*row["messages"], *tiny_rows(1)[0]["messages"][-2:]]} for row in tiny_rows(6)]
    data = write(tmp_path / "rows.jsonl", [*rows, *tiny_rows(6, seed=1)])
    check = the(doctor(folder, dataset_name=data), "Turns")
    assert re.match(r"[56] of 11 rows have earlier assistant turns", check.message)
    assert "assistant_turns=all" in check.remedy
    assert not found(doctor(folder, dataset_name=data, assistant_turns="all"), "Turns")
    assert not found(doctor(folder), "Turns")


def test_rows_name_a_teacher_that_exists(folder, tmp_path):
    """As the run would say: the column is looked at before any model is loaded."""
    data = write(tmp_path / "rows.jsonl", [{**row, "teacher": "b"} for row in tiny_rows(8)])
    adapters = json.dumps({"a": None, "c": None})
    check = the(doctor(folder, dataset_name=data, teacher_adapters=adapters), "Rows")
    assert check.level == "error"
    assert "'b', which no teacher is called" in check.message


@pytest.mark.parametrize(("ended", "level"), [(0.9, "ok"), (0.75, "warning")])
def test_the_share_of_cut_off_rollouts_is_judged_as_in_the_metrics(ended, level):
    values = {"ended": Estimate(ended, None, 8), "length": Estimate(5.0), "repeated_4grams": Estimate(0.0)}
    out = Diagnosis()
    gkd.commands.doctor.models._rollouts(out, Measures("student", values), 32, 0.5)
    assert out.checks[0].level == level


# ------------------------------------------------------------------------------------------------ memory and time


def test_the_steps_that_are_counted_are_those_of_a_run(folder, tmp_path, capsys):
    from training import config, trainer_of

    values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2.5}
    trainer = trainer_of(tmp_path, **values, max_steps=-1)  # 16 rows
    trainer.train()
    args = config(tmp_path, **values, max_steps=-1)
    own, schedule = timed_steps(args, 16)
    assert schedule.steps == trainer.state.global_step == trainer.state.max_steps
    assert (schedule.micro_batches, schedule.timed) == (3, 3)
    few = config(tmp_path, **values, max_steps=-1, rollout_batch_size=4)
    assert timed_steps(few, 16)[1].timed == 2
    assert (args.gradient_accumulation_steps, own.gradient_accumulation_steps) == (3, 3)
    assert (args.max_steps, own.max_steps) == (-1, 2)
    check = the(doctor(folder, **values, max_steps=-1, rollout_batch_size=4), "Time")
    assert ": 8 steps of" in check.message  # 15 rows: 8 micro-batches, 3 steps an epoch
    assert "one timed step of 4 rows, times 1.5" in check.message
    assert check.level == "ok"


def test_schedules_are_told_and_stand_still_while_steps_are_timed(tmp_path):
    from training import config

    args = config(tmp_path, lmbda="0@0 1@2", max_new_tokens="4@0 16@50% 8@100%", temperature="1@0 0.5@9", max_steps=5)
    own, schedule = timed_steps(args, 16)
    assert (own.lmbda, own.max_new_tokens, own.temperature) == (pytest.approx((0 + 0.5 + 3) / 5), 16, 0.5)
    assert (args.lmbda, args.max_new_tokens) == ("0@0 1@2", "4@0 16@50% 8@100%")
    out = Diagnosis()
    examine_schedules(out, args, schedule.steps)
    message = the(out, "Schedules").message
    assert message.startswith(
        "lmbda 0 at first, 1 halfway, 1 at last, 0.7 on average; max_new_tokens 4 at first, 16 half"
    )
    assert message.endswith("over 5 steps")
    still = Diagnosis()
    examine_schedules(still, config(tmp_path), 5)
    assert not still.checks
    decided = Diagnosis()
    examine_schedules(decided, config(tmp_path, lmbda="auto"), 5)
    assert "lmbda as the run decides, from 0.25 at first" in the(decided, "Schedules").message


def test_the_time_is_that_of_the_second_step(folder, monkeypatch):
    """With a clock that stands still outside of the student's steps, each of which takes 2 s."""
    from gkd.commands.doctor import cost as doctor_cost

    trainer_steps = []
    monkeypatch.setattr(doctor_cost._Clock, "on_step_end", lambda self, *_, **__: self.ends.append(5.0 + 2 * step()))

    def step():
        trainer_steps.append(1)
        return len(trainer_steps) ** 2  # 1, 4: the second step takes 6 s

    message = the(doctor(folder, max_steps=100), "Time").message
    assert message.startswith("about 10 min: 100 steps of 6 s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min"), (190_800, "2 days 5 h")],
)
def test_durations(seconds, text):
    assert rough_duration(seconds) == text


def test_memory_is_that_of_the_plan_and_warns_when_it_is_not_there(folder, monkeypatch, capsys):
    assert main(["plan", *argv(folder), "--json"]) == 0
    peak = json.loads(capsys.readouterr().out)["peak"]
    check = the(doctor(folder), "Memory")
    assert check.level == "ok"
    assert f"about {peak / 2**30:.1f} GiB" in check.message
    monkeypatch.setattr("gkd.commands.doctor.cost.capacity", lambda device: 2**20)
    check = the(doctor(folder), "Memory")
    assert check.level == "warning"
    assert "does not fit" in check.message
    assert "gkd plan" in check.remedy


# ------------------------------------------------------------------------------------------------------- a server


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.005)
    with FakeServer(tiny_model(seed=2, hidden=48, layers=3), tiny_tokenizer()) as server:
        yield server


def on_server(server):
    return {"teacher_server_url": server.url, "teacher_top_k": 20, "rollout_server_timeout": 5, "max_length": 200}


def argv_of_server(folder, server):
    recipe, *flags = argv(folder, **on_server(server))
    at = flags.index("--teacher_model_name_or_path")
    return [recipe, *flags[:at], *flags[at + 2 :]]


def test_doctor_and_evaluate_with_a_teacher_on_a_server(folder, server, capsys):
    """The same numbers as with that teacher in the process, where a server tells them exactly."""
    assert main(["doctor", *argv_of_server(folder, server), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in out["checks"]}
    assert "on a server" in checks["Models"]["message"]
    local = the(doctor(folder, max_length=200), "Perplexity").message
    assert checks["Perplexity"]["message"] == local
    assert "20 most likely" in checks["Divergence"]["message"]
    assert checks["Time"]["level"] == "ok"
    assert len(out["rollouts"]) == 8
    assert main(["evaluate", *argv_of_server(folder, server), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["models"]["teacher"]["score_greedy"]["count"] == 1  # one held-out row
    assert out["models"]["student"]["divergence_own"]["value"] > 0


def test_a_run_with_a_teacher_on_a_server_has_its_table(folder, server, tmp_path, monkeypatch):
    recipe, *flags = argv_of_server(folder, server)
    flags += ["--max_steps", "1", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    assert main(["run", recipe, *flags, "--eval_strategy", "epoch"]) == 0
    rows = {row["key"]: row for row in json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]}
    assert rows["perplexity"]["teacher"]["value"] > 1
    assert rows["divergence_own"]["before"]["value"] > 0
    assert rows["score_greedy"]["after"] is not None
    assert "lower bound" in (tmp_path / "out" / "evaluation.json").read_text()


def test_a_server_that_fails_is_a_line(folder, server):
    server.faults["/inference/v1/generate"] = [None, *[400] * 1000]
    recipe, *flags = argv_of_server(folder, server)
    diagnosis = examine(capture(recipe, flags))
    errors = [check for check in diagnosis.checks if check.level == "error"]
    assert {check.name for check in errors} == {"Rollouts", "Time"}
    assert all("teacher_server_url" in check.message or "HTTP 400" in check.message for check in errors)


# ------------------------------------------------------------------------------------------------------- evaluate


def test_an_evaluation_that_is_off_prepares_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("gkd.assembly.evaluator._prepared", lambda *_: pytest.fail("prompts were prepared"))
    flags = ["--max_steps", "1", "--report_to", "none", "--evaluate_before_and_after", "false"]
    assert main(["run", *argv(folder), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "evaluation.json").exists()


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


def test_evaluate_asks_no_rollout_server(folder, capsys):
    """Of a recipe that trains with one, which need not run any more."""
    flags = ["--rollout_backend", "vllm", "--rollout_server_url", "http://127.0.0.1:9", "--json"]
    assert main(["evaluate", *argv(folder), *flags]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["models"]["student"]["divergence_own"]["value"] > 0.01


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
    narrow = get_peft_model(tiny_model(seed=1, hidden=16), LoraConfig(target_modules="all-linear"))
    narrow.save_pretrained(tmp_path / "narrow")
    with pytest.raises(SystemExit):
        main(["evaluate", *argv(folder), "--adapter", str(tmp_path / "narrow")])
    refusal = capsys.readouterr().err
    assert "--adapter=" in refusal
    assert "does not fit the model" in refusal


def test_gkds_own_help_fits_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "example:" in lines[-5:]


@pytest.mark.parametrize(
    "command", ["run", "new", "doctor", "evaluate", "precompute", "plan", "serve", "sweep", "recipes", "export"]
)
def test_help_fits_a_screen_and_ends_with_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[-2] == "example:"
    assert lines[-1].startswith(f"  gkd {command} ")
