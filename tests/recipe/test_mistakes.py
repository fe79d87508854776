"""What users get wrong: every mistake ends in one line that names it, with exit code 2 (the doctor's: 1), no trace."""

import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from forked import Child
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model, tiny_rows

from gkd.cli import main

ROOT = Path(__file__).resolve().parents[2]
START = "from gkd.run import dataset_by_name, run, with_held_out\n\ndef load_data(settings):\n"
GOOD = "    return with_held_out(dataset_by_name(settings), 4)\n"
END = "\nrun(load_data, defaults={'max_new_tokens': 4, 'max_steps': 1, 'report_to': 'none', 'num_eval_prompts': 2})\n"
SCORE = "\ndef score(completion, row):\n    return row['none']\n" + END.replace("run(", "run(score=score, load_data=")

RECIPES = {
    "good": START + GOOD + END,
    "syntax": "def load_data(:\n",
    "name": "from gkd.run import run\n\nrun(load_dta)\n",
    "package": "import a_package_that_nobody_has\n",
    "silent": "x = 1\n",
    "argument": "from gkd.run import dataset_by_name, run\n\nrun(dataset_by_name, default={})\n",
    "default": "from gkd.run import dataset_by_name, run\n\nrun(dataset_by_name, defaults={'lmda': 1})\n",
    "type": "from gkd.run import dataset_by_name, run\n\nrun(dataset_by_name, defaults={'seed': 2.5})\n",
    "nothing": START + "    pass\n" + END,
    "list": START + "    return [1]\n" + END,
    "rows": START + "    return {'train': [{'prompt': 'a', 'completion': 'b'}]}\n" + END,
    "test": START + "    return {**dataset_by_name(settings), 'test': 1}\n" + END,
    "column": START + "    return {'train': dataset_by_name(settings)['train'].map(lambda row: row['none'])}\n" + END,
    "signature": START.replace("(settings)", "()") + "    return {}\n" + END,
    "score": START + GOOD + SCORE,
}
YAML = {
    "unknown": "lmda: 0.3\n",
    "list": "- lmbda\n",
    "syntax": "lmbda: [1\n  b: }\n",
    "fraction": "per_device_train_batch_size: 2.5\n",
    "empty": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: models whole and broken, adapters, data, recipes, YAML files."""
    path = tmp_path_factory.mktemp("user")
    save_tiny(path / "student", seed=1)
    save_tiny(path / "teacher", seed=2, hidden=48, layers=3)
    for name in ("config_broken", "config_missing", "weights_missing", "weights_cut", "tokenizer_broken", "kind"):
        shutil.copytree(path / "student", path / name)
    (path / "config_broken" / "config.json").write_text("{")
    (path / "config_missing" / "config.json").unlink()
    (path / "weights_missing" / "model.safetensors").unlink()
    weights = path / "weights_cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (path / "tokenizer_broken" / "tokenizer.json").write_text("{}")
    (path / "kind" / "config.json").write_text('{"model_type": "nonesuch"}')
    (path / "empty").mkdir()
    (path / "file").write_text("")
    (path / "none.jsonl").write_text("")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(16)))
    (path / "odd.jsonl").write_text('{"foo": "a", "bar": "b"}\n' * 4)
    wide = get_peft_model(tiny_model(hidden=64), LoraConfig(target_modules="all-linear"))
    wide.save_pretrained(path / "wide_adapter")
    for name, text in RECIPES.items():
        (path / f"{name}.py").write_text(text)
    for name, text in YAML.items():
        (path / f"{name}.yaml").write_text(text)
    return path


FIELDS = {
    "--model_name_or_path": "student",
    "--teacher_model_name_or_path": "teacher",
    "--dataset_name": "rows.jsonl",
    "--output_dir": "out",
}


def command(words):
    """The words, and the fields that they leave out."""
    return [*words, *(part for flag, value in FIELDS.items() if flag not in words for part in (flag, value))]


def ends(argv, folder, monkeypatch, capsys):
    """The message and exit code of a command in the user's folder."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GKD_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(told) == 1, captured.err
    assert "Traceback" not in captured.err + captured.out
    return told[0], stopped.value.code


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("run nowhere.py", ["no recipe", "nowhere.py"]),
        ("run empty", ["no recipe", "empty"]),
        ("doctor nowhere.py", ["no recipe"]),
        ("run syntax.py", ["syntax.py, line 1", "syntax"]),
        ("doctor name.py", ["name.py, line 3", "load_dta"]),
        ("run package.py", ["package.py, line 1", "a_package_that_nobody_has"]),
        ("run argument.py", ["argument.py, line 3", "'default'"]),
        ("run default.py", ["'lmda'", "did you mean lmbda?"]),
        ("run type.py", ["seed=2.5", "whole number"]),
        ("plan silent.py", ["silent.py", "run(load_data"]),
        ("run nothing.py", ["load_data returned NoneType", "'train'"]),
        ("evaluate list.py", ["load_data returned list", "'train'"]),
        ("run rows.py", ["got list", "Dataset.from_list"]),
        ("run test.py", ["'test'", "held_out_text"]),
        ("run column.py", ["column.py, line 4", "KeyError: 'none'"]),
        ("run signature.py", ["load_data(settings)", "too many"]),
        ("run score.py", ["score.py, line 7", "KeyError: 'none'"]),
        ("run good.py --lmda 0.3", ["'--lmda'", "did you mean --lmbda?"]),
        ("doctor good.py words", ["'words'"]),
        ("run good.py --lmbda high", ["lmbda='high'", "a number"]),
        ("run good.py --dtype float17", ["--dtype", "float17", "bfloat16"]),
        ("run good.py --per_device_train_batch_size 0", ["per_device_train_batch_size=0", "1 or more"]),
        ("run good.py --gradient_accumulation_steps 0", ["gradient_accumulation_steps=0"]),
        ("run good.py --num_eval_prompts 0", ["num_eval_prompts=0", "evaluate_before_and_after"]),
        ("run good.py --num_train_epochs 0 --max_steps -1", ["num_train_epochs=0", "max_steps"]),
        ("run good.py --lm_eval_limit 3", ["lm_eval_limit=3", "lm_eval_tasks"]),
        ("run good.py --teacher_model_init_kwargs {dtype", ["teacher_model_init_kwargs='{dtype'", "JSON"]),
        ("run good.py --generation_kwargs [1]", ["generation_kwargs=[1]", "dictionary"]),
        ("run good.py --config unknown.yaml", ["'lmda'", "did you mean lmbda?"]),
        ("run good.py --config=list.yaml", ["list.yaml", "lmbda: 0.5"]),
        ("run good.py --config syntax.yaml", ["syntax.yaml", "line 2"]),
        ("run good.py --config fraction.yaml", ["per_device_train_batch_size=2.5", "whole number"]),
        ("run good.py --config empty.yaml", ["empty.yaml"]),
        ("run good.py --config nowhere.yaml", ["nowhere.yaml", "no such file"]),
        ("run good.py --output_dir file", ["output_dir='file'", "another folder"]),
        ("run good.py --dataset_name nowhere.jsonl", ["nowhere.jsonl"]),
        ("run good.py --dataset_name none.jsonl", ["none.jsonl", "empty"]),
        ("run good.py --dataset_name odd.jsonl", ["row 0", "'bar', 'foo'"]),
        ("run good.py --model_name_or_path empty", ["'empty'", "cannot be loaded"]),
        ("run good.py --model_name_or_path config_broken", ["'config_broken'", "JSON"]),
        ("run good.py --model_name_or_path weights_missing", ["model_name_or_path='weights_missing'"]),
        ("run good.py --model_name_or_path weights_cut", ["model_name_or_path='weights_cut'", "deserializing"]),
        ("run good.py --model_name_or_path tokenizer_broken", ["tokenizer of 'tokenizer_broken'"]),
        ("run good.py --teacher_model_name_or_path config_missing", ["teacher_model_name_or_path='config_missing'"]),
        ("run good.py --teacher_model_name_or_path weights_cut", ["teacher_model_name_or_path='weights_cut'"]),
        ("run good.py --teacher_model_name_or_path kind", ["teacher_model_name_or_path='kind'", "nonesuch"]),
        ("plan good.py --teacher_model_name_or_path empty", ["teacher_model_name_or_path='empty'"]),
        ("plan good.py --gpu_memory lots", ["gpu_memory='lots'", "80GB"]),
        ("evaluate good.py --adapter nowhere", ["--adapter='nowhere'", "neither a folder nor an adapter"]),
        ("evaluate good.py --adapter student", ["--adapter student", "--model_name_or_path student"]),
        ("evaluate good.py --adapter wide_adapter", ["--adapter='wide_adapter'", "size mismatch"]),
        ("run good.py --use_peft --lora_target_modules none", ["none", "not found"]),
        ("precompute good.py --precompute_output file", ["'file'", "new folder"]),
    ],
)
def test_a_mistake_is_one_line(words, parts, folder, monkeypatch, capsys):
    message, code = ends(command(words.split()), folder, monkeypatch, capsys)
    assert code == 2
    for part in parts:
        assert part in message


def test_a_new_recipe_that_cannot_be_written(folder, monkeypatch, capsys):
    words = "new mine --data rows.jsonl --student student --teacher teacher --output file/mine.py"
    message, code = ends(words.split(), folder, monkeypatch, capsys)
    assert code == 2
    assert "file/mine.py" in message
    assert "--output" in message


@pytest.mark.parametrize(
    ("words", "line", "parts"),
    [
        ("doctor list.py", "Data", ["load_data returned list"]),
        ("doctor column.py", "Data", ["column.py, line 4", "KeyError"]),
        ("doctor good.py --model_name_or_path nowhere", "Tokenizers", ["'nowhere'"]),
        ("doctor good.py --model_name_or_path tokenizer_broken", "Tokenizers", ["'tokenizer_broken'"]),
        ("doctor good.py --teacher_model_name_or_path empty", "Token maps", ["teacher_model_name_or_path='empty'"]),
        ("doctor good.py --model_name_or_path weights_cut", "Models", ["model_name_or_path='weights_cut'"]),
        ("doctor good.py --teacher_model_name_or_path weights_missing", "Models", ["'weights_missing'"]),
        ("doctor good.py --dataset_name odd.jsonl", "Rows", ["'bar', 'foo'", "messages"]),
    ],
)
def test_the_doctor_makes_a_line_of_it(words, line, parts, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main([*command(words.split()), "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    (error,) = [check for check in checks if check["level"] == "error"]
    assert error["name"] == line
    assert all(part in error["message"] for part in parts), error


def test_a_fault_of_our_own_keeps_its_trace(folder, monkeypatch):
    """One line is for the user's mistakes: what breaks inside the package is shown whole."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gkd.run.recipe_data", operator.itemgetter("ours"))  # is called with two arguments
    with pytest.raises(TypeError, match="itemgetter"):
        main(command(["run", "good.py"]))


@pytest.fixture
def slow(tmp_path):
    """A recipe whose data take a minute to load, and the file that it leaves when it has begun to."""
    mark = tmp_path / "loading"
    wait = f"    import pathlib, time\n    pathlib.Path({str(mark)!r}).touch()\n    time.sleep(60)\n"
    (tmp_path / "slow.py").write_text(START + wait + GOOD + END)
    return str(tmp_path / "slow.py"), mark


def test_ctrl_c_is_clean(slow, folder):
    """While the recipe loads its data: the process says so in one line and leaves with 130."""
    recipe, mark = slow
    argv = [sys.executable, "-m", "gkd.cli", "run", recipe, *command([])]
    process = subprocess.Popen(
        argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | _path()
    )
    while not mark.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    assert err.rstrip().endswith("stopped by Ctrl-C")


@pytest.mark.parametrize("name", ["run", "doctor", "evaluate", "precompute"])
def test_ctrl_c_is_clean_in_every_command(name, slow, folder, tmp_path, monkeypatch, capfd):
    """The same of processes that have imported everything."""
    recipe, mark = slow
    monkeypatch.chdir(folder)
    child = Child(lambda _say: sys.exit(main([name, recipe, *command([])])), tmp_path / "said.txt")
    while not mark.exists() and psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    child.send(signal.SIGINT)
    assert child.join() == 130, child.said()
    out, err = capfd.readouterr()  # the child writes where this process does
    assert "Traceback" not in out + err + child.said()
    assert err.rstrip().endswith("stopped by Ctrl-C")


def _path():
    return {"PYTHONPATH": str(ROOT)}
