"""`gkd new` on the formats that data comes in: what it reads off, and that the recipe it writes runs."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import save_tiny, tiny_rows, tiny_tokenizer

from gkd.cli import main
from gkd.commands.new_look import look_at
from gkd.recipe.capture import capture

ROOT = Path(__file__).resolve().parents[2]

FORMATS = {
    "messages": tiny_rows(8),
    "conversations": [
        {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "Yes"}]} for n in range(8)
    ],
    "alpaca": [{"instruction": f"Add {n}.", "input": "1", "output": str(n + 1)} for n in range(8)],
    "text pairs": [{"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in range(8)],
    "questions": [{"question": f"What is {n} + 1?", "answer": f'"{n + 1}"', "id": n} for n in range(8)],
    "summaries": [{"document": f"It rained {n} days. " * 4, "summary": "Rain."} for n in range(8)],
    "prompts only": [{"prompt": [{"role": "user", "content": f"Count to {n}."}]} for n in range(8)],
    "queries only": [{"query": f"Count to {n}."} for n in range(8)],
    "running text": [{"text": f"It rained on {n} days of the year."} for n in range(8)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    save_tiny(path / "student", seed=1)
    save_tiny(path / "plain", seed=1, tokenizer=tiny_tokenizer(chat_template=None))
    save_tiny(path / "teacher", seed=2, hidden=48, layers=3)
    return path


def new(folder, rows, *options, student="student", file="rows.jsonl"):
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["new", "mine", "--data", str(folder / file), "--student", str(folder / student)]
    command += ["--teacher", str(folder / "teacher"), "--output", str(folder / "mine.py"), "--force", *options]
    assert main(command) == 0
    return folder / "mine.py"


def test_the_recipe_finds_its_files_from_another_folder(folder, tmp_path, monkeypatch):
    (folder / "near.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FORMATS["questions"]))
    monkeypatch.chdir(folder)
    command = ["new", "mine", "--data", "near.jsonl", "--student", "student", "--teacher", "far/teacher"]
    assert main([*command, "--output", "near.py"]) == 0
    monkeypatch.chdir(tmp_path)
    recipe = capture(folder / "near.py", [])
    assert len(recipe.load_data(recipe.settings)["train"]) == 7  # one of 8 is held out
    assert recipe.settings.model.model_name_or_path == str(folder / "student")
    assert recipe.settings.training.teacher_model_name_or_path == "far/teacher"  # a name on the Hub


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_recipe_for_every_format_trains_one_step(name, folder, tmp_path, monkeypatch):
    recipe = new(folder, FORMATS[name])
    flags = ["--max_steps", "1", "--output_dir", str(tmp_path), "--max_new_tokens", "4", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", [str(recipe), *flags, "--num_eval_prompts", "1"])
    runpy.run_path(str(recipe), run_name="__main__")
    (entry,) = [
        line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "train_loss" in line
    ]
    assert entry["train_loss"] > 0
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["questions", "running text", "queries only"])
def test_the_file_is_as_the_project_formats_it(name, folder):
    recipe = new(folder, FORMATS[name])
    for check in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(recipe)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_what_the_data_says_goes_into_the_recipe(folder):
    settings = capture(new(folder, FORMATS["messages"]), []).settings
    assert (settings.training.lmbda, settings.training.seq_kd) == (0.5, False)
    assert settings.model.model_name_or_path == str(folder / "student")
    assert settings.training.output_dir == "outputs/mine"
    only_prompts = capture(new(folder, FORMATS["prompts only"]), []).settings.training
    assert (only_prompts.lmbda, only_prompts.seq_kd) == (0.5, True)
    text = capture(new(folder, FORMATS["running text"]), []).settings.training
    assert text.lmbda == 0
    long = [{"prompt": "a ", "completion": "x" * 1000}] * 5
    args = capture(new(folder, long), []).settings.training
    assert args.max_new_tokens == 384  # 1000 / 3, up to a multiple of 64
    assert args.max_length > args.max_new_tokens


def test_questions_become_chats_only_with_a_chat_template(folder):
    for student, prompt in (("student", [{"role": "user", "content": "What is 0 + 1?"}]), ("plain", "What is 0 + 1?")):
        recipe = runpy.run_path(str(new(folder, FORMATS["questions"], student=student)), run_name="recipe")
        assert recipe["as_row"](FORMATS["questions"][0]) == {"prompt": prompt, "completion": '"1"'}


def test_columns_of_any_name(folder):
    rows = [{'Frage "1"': "Wie?", "Antwort": "So.", "id": n} for n in range(8)]
    options = ["--prompt_column", 'Frage "1"', "--completion_column", "Antwort"]
    recipe = runpy.run_path(str(new(folder, rows, *options)), run_name="recipe")
    assert recipe["as_row"](rows[0])["completion"] == "So."


def questions_with_numbers(folder, suffix):
    """A table as a spreadsheet saves it: the answers are numbers, two columns are of no use."""
    rows = Dataset.from_list(
        [{"id": n, "question": f"What is {n} + 1?", "note": None, "answer": n + 1} for n in range(8)]
    )
    path = folder / f"table.{suffix}"
    {"csv": rows.to_csv, "parquet": rows.to_parquet, "json": lambda p: rows.to_json(p, lines=False)}[suffix](str(path))
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_tables_with_numbers_and_other_columns(suffix, folder, tmp_path, monkeypatch):
    command = [
        "new",
        "mine",
        "--data",
        str(questions_with_numbers(folder, suffix)),
        "--output",
        str(tmp_path / "x.py"),
    ]
    command += ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    assert main(command) == 0
    recipe = runpy.run_path(str(tmp_path / "x.py"), run_name="recipe")
    row = recipe["as_row"]({"question": "Q", "answer": 3 if suffix != "csv" else "3"})
    assert row == {"prompt": [{"role": "user", "content": "Q"}], "completion": "3"}
    flags = ["--max_steps", "2", "--output_dir", str(tmp_path), "--max_new_tokens", "4", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "x.py"), *flags, "--num_eval_prompts", "1"])
    runpy.run_path(str(tmp_path / "x.py"), run_name="__main__")
    assert '"train_loss"' in (tmp_path / "metrics.jsonl").read_text()


def test_a_number_that_is_missing_is_no_text():
    rows = Dataset.from_list([{"question": "a", "answer": 1}, {"question": "b", "answer": None}])
    with pytest.raises(ValueError, match="row 0"):
        look_at(rows, False)


def test_a_known_format_wins_over_a_pair_of_names():
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "answer": "c"}])
    assert look_at(rows, False).pair is None
    rows = Dataset.from_list([{"prompt": "a", "answer": "c"}])
    assert look_at(rows, False).pair == ("prompt", "answer")
    rows = Dataset.from_list([{"instruction": "a", "input": "b", "output": "c"}])
    assert look_at(rows, False).pair is None


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--data", "none.jsonl"], ["none.jsonl", "does not exist"]),
        (["--prompt_column", "Frage"], ["'Frage'", "question, answer"]),
        (["--completion_column", "answer"], ["--prompt_column", "--prompt_template"]),
        (["--prompt_template", "{Frage}"], ["'Frage'", "question, answer"]),
        (["--prompt_template", "no column"], ["--prompt_template", "braces"]),
        (["--prompt_template", "{question"], ["--prompt_template", "no template"]),
        (["--prompt_template", "{question!r}"], ["--prompt_template", "braces"]),
        (["--prompt_template", "{question}", "--prompt_column", "question"], ["--prompt_template", "--prompt_column"]),
        (["--output", "mine.txt"], [".py"]),
        (["--output", "there.py"], ["there.py", "--force"]),
    ],
)
def test_mistakes_are_answered_in_one_line(options, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(SystemExit) as stopped:
        main(["new", "mine", "--data", "rows.jsonl", "--student", "x", "--teacher", "y", *options])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert "Traceback" not in message
    assert (tmp_path / "there.py").read_text() == ""


@pytest.mark.parametrize("rows", [[{"foo": "a", "bar": "b"}], [{"messages": [{"role": "user"}]}]])
def test_data_of_no_known_format_is_named(rows, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        main(
            [
                "new",
                "mine",
                "--data",
                str(tmp_path / "rows.jsonl"),
                "--student",
                "x",
                "--teacher",
                "y",
                "--output",
                str(tmp_path / "mine.py"),
            ]
        )
    assert next(iter(rows[0])) in capsys.readouterr().err
    assert not (tmp_path / "mine.py").exists()


PASSAGES = [
    {"passage": f"There are {n} {{red}} apples.", "question": "How many?", "n": n, "answer": str(n), "title": "x" * n}
    for n in range(3, 11)
]


def test_a_prompt_of_several_columns(folder, caplog):
    recipe = new(folder, PASSAGES, "--prompt_template", r"{passage}\n{question} ({n})")
    made = runpy.run_path(str(recipe), run_name="recipe")["as_row"](PASSAGES[0])
    prompt = "There are 3 {red} apples.\nHow many? (3)"
    assert made == {"prompt": [{"role": "user", "content": prompt}], "completion": "3"}
    assert "the recipe does not use title; into the prompt" in caplog.text
    assert "does not use" not in recipe.read_text()
    plain = new(folder, PASSAGES, "--prompt_template", "{n}: ", "--completion_column", "title", student="plain")
    assert runpy.run_path(str(plain), run_name="recipe")["as_row"](PASSAGES[0]) == {
        "prompt": "3: ",
        "completion": "xxx",
    }


def test_text_that_goes_nowhere_is_named_with_the_way_to_use_it(folder, caplog):
    new(folder, PASSAGES)
    assert "the recipe does not use passage, title; into the prompt with" in caplog.text
    assert "'{passage}\\\\n{question}'" in caplog.text
    caplog.clear()
    new(folder, FORMATS["questions"])  # an id is no text
    assert "does not use" not in caplog.text


def test_a_chosen_answer_that_holds_the_whole_chat(folder):
    ask, say = ({"role": role, "content": text} for role, text in (("user", "How many?"), ("assistant", "Three.")))
    rows = [{"prompt": "How many?", "chosen": [ask, say], "rejected": [ask, say]}] * 4
    recipe = runpy.run_path(str(new(folder, rows)), run_name="recipe")
    assert recipe["as_row"](rows[0]) == {"prompt": [ask], "completion": [ask, say]}
    asked = [{"prompt": [ask], "chosen": [ask, say]}] * 4
    assert runpy.run_path(str(new(folder, asked)), run_name="recipe")["as_row"](asked[0])["prompt"] == [ask]


def test_several_answers_of_a_chat_are_hinted_at(folder):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    text = new(folder, [{"messages": turns}] * 4).read_text()
    assert '"assistant_turns": "last",  # all trains on each: 4 of the first rows have several answers' in text


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"foo": "a", "bar": "b"}], ["foo, bar", "--prompt_column", "--completion_column", "--prompt_template"]),
        ([{"question": "a", "answer": ["b", "c"]}], ["row 0, column 'answer': should be text, got list ['b', 'c']"]),
        ([{"question": "a", "answer": "b"}, {"question": None, "answer": "b"}], ["row 1, column 'question': is None"]),
        ([{"a\x1b[2J": "a", "b\x9b": "b"}], ["a\\x1b[2J"]),
    ],
)
def test_what_is_wrong_is_said_with_the_names_of_the_data(rows, parts, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--student", "x", "--teacher", "y", "--output", str(tmp_path / "mine.py")]
    with pytest.raises(SystemExit):
        main(["new", "mine", "--data", str(tmp_path / "rows.jsonl"), *flags])
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert "\x1b" not in message


def test_column_names_with_escapes_are_written_as_escapes(folder):
    rows = [{"a\x1b\n\x9b\u202e😀": "1?", "b": "2"}] * 3
    recipe = new(folder, rows, "--prompt_column", next(iter(rows[0])), "--completion_column", "b")
    assert recipe.read_text().isascii() or "\x1b" not in recipe.read_text()
    assert runpy.run_path(str(recipe), run_name="recipe")["as_row"](rows[0])["completion"] == "2"


@pytest.mark.parametrize("name", ["../up", "a b", "class", ""])
def test_names_that_are_no_names(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["new", name, "--data", "rows.jsonl", "--student", "x", "--teacher", "y"])
    assert "NAME" in capsys.readouterr().err
