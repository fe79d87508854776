"""Loggers with their real clients: what a run leaves for W&B, TensorBoard and Trackio, read back from their files."""

import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_rows

from gkd.common.redact import REDACTED
from gkd.config.fields import GKDConfig
from gkd.run import run

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "Lg5" * 11
MEASURED = {"divergence_own", "divergence_teacher_text", "ended", "length"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    save_tiny(path / "student", seed=1)
    save_tiny(path / "teacher", seed=2, hidden=48, layers=3)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(16)))
    return path


def flags(folder, **changes):
    values = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": "out",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "max_new_tokens": 6,
        "num_eval_prompts": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "log_completions": "true",
        "log_completions_steps": 2,
        "hub_token": TOKEN,
        "teacher_model_init_kwargs": json.dumps({"token": TOKEN}),
        **changes,
    }
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def history():
    """The lines of metrics.jsonl, and the values before and after the training by name."""
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    places = {name: value for line in lines for name, value in line.items() if name.startswith("eval_")}
    rows = {row["key"]: row for row in json.loads(Path("out/evaluation.json").read_text())["rows"]}
    for key in MEASURED:
        for place in ("before", "after", "teacher"):
            assert places[f"eval_{place}/{key}"] == rows[key][place]["value"]
    return lines, places


def no_token_in(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path


# ------------------------------------------------------------------------------------------------ Weights & Biases


@pytest.fixture(scope="module")
def wandb_run(folder, tmp_path_factory):
    """An offline run of the real client, read back from its own log."""
    import wandb
    from wandb_file import offline_run

    place = tmp_path_factory.mktemp("wandb_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(place))
        patch.setenv("WANDB_SILENT", "true")
        patch.setattr(sys, "argv", ["recipe.py", "--hub_token", TOKEN, "--rollout_server_url", f"http://{TOKEN}@host"])
        wandb.teardown()  # a client that another test has set up would keep its settings
        run(argv=flags(folder, report_to="wandb"))
        wandb.finish()
        wandb.teardown()
        yield offline_run(place), *history()


def test_wandb_has_every_field_and_no_secret(wandb_run):
    kept, _, _ = wandb_run
    fields = {field.name for field in dataclasses.fields(GKDConfig) if field.init}
    assert fields <= set(kept.config), fields - set(kept.config)
    assert (kept.config["lmbda"], kept.config["max_new_tokens"], kept.config["log_completions_steps"]) == (0.5, 6, 2)
    assert kept.config["hub_token"] == REDACTED
    no_token_in(kept.folder)


def test_wandb_metrics_are_those_of_the_run_in_groups(wandb_run):
    kept, lines, _ = wandb_run
    logged = {line["train/global_step"]: line for line in kept.history if "train/loss" in line}
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    for line in trained:
        for name, value in line.items():
            if name != "step":
                assert logged[line["step"]][f"train/{name}"] == pytest.approx(value), name
    for group in ("loss", "rollout", "student", "teacher", "time", "ledger"):
        assert any(name.startswith(f"train/{group}/") for name in logged[1]), group


def test_wandb_summary_has_before_after_and_teacher(wandb_run):
    kept, _, places = wandb_run
    for name, value in places.items():
        assert kept.summary["eval/" + name.removeprefix("eval_")] == pytest.approx(value), name
    assert {f"eval/{place}/length" for place in ("before", "after", "teacher")} <= set(kept.summary)


def test_wandb_gets_the_completions_of_the_step(wandb_run):
    kept, _, _ = wandb_run
    (line,) = [line for line in kept.history if "completions/path" in line]
    assert line["train/global_step"] == 2
    table = json.loads((kept.folder / "files" / line["completions/path"]).read_text())
    assert table["columns"] == ["step", "source", "prompt", "completion", "end", "tokens", "divergence"]
    assert len(table["data"]) == 4  # the whole step, with half of it from the student
    assert sorted(row[1] for row in table["data"]) == ["data", "data", "student", "student"]
    assert all(row[0] == 2 and row[6] > 0 and "<|im_start|>" in row[2] for row in table["data"])


# ---------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_has_everything_in_one_place(folder, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run(argv=flags(folder, report_to="tensorboard"))
    assert not Path("runs").exists()  # where the writer goes that is made before the training
    (place,) = Path("out/runs").iterdir()
    events = EventAccumulator(str(place), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    lines, places = history()
    for line in lines:
        for name, value in line.items():
            if "loss" in line and name != "step":
                points = {event.step: event.value for event in events.Scalars(f"train/{name}")}
                assert points[line["step"]] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for name, value in places.items():
        (event,) = events.Scalars("eval/" + name.removeprefix("eval_"))
        assert event.value == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert event.step == (3 if "after" in name else 0)
    (text,) = events.Tensors("completions/text_summary")
    assert text.step == 2
    shown = text.tensor_proto.string_val[0].decode()
    assert shown.startswith("| step | source | prompt | completion | end | tokens | divergence |\n| --- |")
    assert shown.count("\n| 2 | ") == 4
    no_token_in("out")


# -------------------------------------------------------------------------------------------------------- Trackio


def test_trackio_has_everything_in_one_run(folder, tmp_path, monkeypatch):
    """Needs Trackio, which is not among the requirements: it brings a web server."""
    pytest.importorskip("trackio")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    argv = flags(folder, report_to="trackio", project="gkd-test")
    code = (
        "import sys; from gkd.run import run; run(argv=sys.argv[1:]);"
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as S;"
        "runs = S.get_runs('gkd-test'); name = ('gkd-test', runs[0]);"
        "kept = {'runs': runs, 'logs': S.get_logs(*name), 'config': S.get_run_config(*name)};"
        "open('kept.json', 'w').write(json.dumps(kept, default=str))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert len(kept["runs"]) == 1, kept["runs"]
    _, places = history()
    values = {name: value for line in kept["logs"] for name, value in line.items()}
    for name, value in places.items():
        assert values["eval/" + name.removeprefix("eval_")] == pytest.approx(value), name
    assert "train/rollout/length_mean" in values
    assert any("completions" in line for line in kept["logs"])
    assert kept["config"]["lmbda"] == 0.5
    no_token_in(tmp_path / "trackio")


# --------------------------------------------------------------------------------------------------- the console


def screen(raw, columns):
    """The lines that a terminal of this width shows in the end: carriage returns, cursor up, erase."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n|\r", raw, re.DOTALL):
        if part == "\n":
            row, column = row + 1, 0
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            if part.endswith("A"):
                row = max(0, row - int(part[2:-1] or 1))
            elif part.endswith("K"):
                lines[row] = lines[row][:column]
        else:
            if column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


WORKER = """
import sys
sys.path.insert(0, {tests!r})
from noise import Noise
import gkd.run
build = gkd.run.build_trainer
def noisy(*args, **options):
    trainer = build(*args, **options)
    trainer.add_callback(Noise())
    return trainer
gkd.run.build_trainer = noisy
gkd.run.run(argv=sys.argv[1:])
"""


def in_a_terminal(argv, columns, folder):
    """Run with standard output and error on a pseudo-terminal; what was written to it."""
    leader, follower = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER.format(tests=str(ROOT / "tests" / "support")), *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdout=follower,
        stderr=follower,
        stdin=subprocess.DEVNULL,
    )
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        written += part
    os.close(leader)
    return process.wait(), written.decode()


def test_one_tidy_bar_that_nothing_breaks(folder, tmp_path):
    columns = 100
    argv = flags(folder, report_to="none", evaluate_before_and_after="false", eval_strategy="no")
    code, written = in_a_terminal(argv, columns, tmp_path)
    assert code == 0, written
    shown = screen(written, columns)
    bars = [line for line in shown if "step/s" in line or "s/step" in line]
    assert len(bars) == 1, "\n".join(shown)
    for part in ("100%", "3/3", "loss=", "λ=0.50", "tok/s="):
        assert part in bars[0], bars[0]
    for step in range(3):
        assert f"a message of step {step}" in shown
        assert sum(f"a warning of step {step}" in line for line in shown) == 1
    (title,) = [line for line in shown if line.startswith("Completions of step 2")]
    top = shown.index(title) + 1
    bottom = next(i for i, line in enumerate(shown) if i > top and line.startswith("└"))
    assert all(line[0] in "┏┃┡│├└" and line[-1] in "┓┃┩│┤┘" for line in shown[top : bottom + 1])


def test_without_a_terminal_a_line_for_each_log(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(argv=flags(folder, report_to="none", evaluate_before_and_after="false", log_completions="false",
                   log_completions_steps=None, logging_steps=2, max_steps=5))  # fmt: skip
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(told) == 3
    for step, line in zip((2, 4, 5), told, strict=True):
        assert re.fullmatch(rf"step {step}/5: loss \d+\.\d{{4}}, λ 0\.50, tok/s \d+, 00:\d\d left", line), line
