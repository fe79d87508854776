"""Pushing to the Hub through the real client, to a stand-in on the loopback: what arrives, what does not, failures."""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
from hub_server import ACCESS_TOKEN, USER, faults_of_card, running_hub
from huggingface_hub import ModelCard
from tiny import save_tiny, tiny_rows
from training import trainer_of
from transformers import Trainer
from transformers.utils.hub import PushInProgress

from gkd.common.errors import PushError

TESTS = Path(__file__).resolve().parents[1] / "support"


class Worker:
    """A process that runs recipes, told where the Hub is."""

    def __init__(self, hub, folder):
        self.hub, self.folder = hub, folder
        self.environment = {**os.environ, **hub.environment(), "PYTHONPATH": str(TESTS.parent)}
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "hub_worker.py")],
            cwd=folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, name, **changes):
        """One run into the folder `name`; (exit code, standard output, standard error)."""
        values = {
            "model_name_or_path": self.folder / "student",
            "teacher_model_name_or_path": self.folder / "teacher",
            "dataset_name": self.folder / "rows.jsonl",
            "output_dir": self.folder / name,
            "max_steps": 1,
            "per_device_train_batch_size": 16,  # enough targets for a point in the picture of positions
            "max_new_tokens": 4,
            "num_eval_prompts": 2,
            "logging_steps": 1,
            "report_to": "none",
            "push_to_hub": "true",
            "hub_strategy": "end",
            "use_peft": "true",
            "lora_r": 2,
            "lora_target_modules": "all-linear",
            **changes,
        }
        argv = [part for key, value in values.items() for part in (f"--{key}", str(value))]
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        assert ACCESS_TOKEN not in told["out"] + told["err"]
        return told["code"], told["out"], told["err"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    save_tiny(folder / "student", seed=1)
    save_tiny(folder / "teacher", seed=2, hidden=48, layers=3)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(16)))
    with running_hub() as hub:
        worker = Worker(hub, folder)
        yield worker
        worker.process.stdin.close()
        worker.process.wait(timeout=60)


@pytest.fixture
def hub(worker):
    """The Hub of the worker, empty."""
    hub = worker.hub
    hub.files.clear()
    hub.requests.clear()
    hub.commits.clear()
    hub.fail, hub.failures = None, -1
    return hub


def local_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(err):
    """The error's line; nothing of Python's way of telling errors around it."""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_everything_arrives_but_secrets_checkpoints_and_caches(worker, hub):
    out = worker.folder / "whole"
    (out / "_rollout_adapters" / "step-1").mkdir(parents=True)
    (out / "_rollout_adapters" / "step-1" / "adapter_model.safetensors").write_bytes(b"for the server only")
    code, _, err = worker.run(
        "whole", hub_token=ACCESS_TOKEN, seq_kd="true", max_steps=2, save_steps=1, hub_strategy="every_save",
        report_to="tensorboard", log_completions="true",
    )  # fmt: skip
    assert code == 0, err
    assert list(out.glob("_teacher_sequences/*/*"))
    assert (out / "checkpoint-2").is_dir()
    assert USER + "/whole" in hub.repos
    names = set(hub.files)
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    facts = {"README.md", "evaluation.json", "metrics.jsonl", "tokenizer.json", "tokenizer_config.json"}
    plots = {f"plots/{name}.png" for name in ("loss", "positions", "lengths", "entropy", "evaluation")}
    assert adapter | facts | plots <= names
    assert not [name for name in names if name.startswith(("_", "checkpoint-"))]
    here = local_files(out)
    for name, content in hub.files.items():
        assert ACCESS_TOKEN.encode() not in content, name
        assert content == here[name], name
    assert "Training in progress, step 1" in hub.commits
    after = [commit for commit in hub.commits if not commit.startswith("Training in progress")]
    assert after == ["End of training"]  # one push, when all is there
    assert ("POST", "/api/validate-yaml") in hub.requests


def test_the_card_passes_the_clients_parser_and_carries_what_was_measured(worker, hub):
    assert worker.run("carded")[0] == 0
    text = hub.files["README.md"].decode()
    assert faults_of_card(text) == []
    assert f'from_pretrained("{USER}/carded")' in text
    data = ModelCard(text).data
    assert data.library_name == "peft"
    evaluation = json.loads(hub.files["evaluation.json"])
    measured = {row["key"]: row["after"]["value"] for row in evaluation["rows"] if row["after"]["value"] is not None}
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == pytest.approx(measured)
    for name in ("loss", "positions", "lengths", "entropy", "evaluation"):
        assert f"](plots/{name}.png)" in text
        assert hub.files[f"plots/{name}.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("no block", "no metadata"),
        ("---\ntags: one\n---\n", "tags"),
        ("---\nmodel-index:\n- name: x\n  results:\n  - task: {type: t}\n---\n", "dataset"),
        (
            "---\nmodel-index:\n- name: x\n  results:\n  - task: {type: t}\n    dataset: {type: d, name: d}\n"
            "    metrics:\n    - {type: m, value: .nan}\n---\n",
            "metric",
        ),
    ],
)
def test_the_stand_in_refuses_broken_cards(broken, fault):
    assert any(fault in told for told in faults_of_card(broken))


def test_a_failing_push_at_the_end_loses_nothing_and_says_how_to_push_again(worker, hub):
    hub.fail = ("/commit/", 500)
    code, out, err = worker.run("unlucky folder", hub_model_id=f"{USER}/chosen")
    folder = worker.folder / "unlucky folder"
    assert code == 1
    line = one_line(err)
    assert f"saved in {folder}" in line
    assert "500" in line
    assert "Student before and after" in out
    here = local_files(folder)
    assert {"adapter_model.safetensors", "README.md", "evaluation.json", "metrics.jsonl", "plots/loss.png"} <= set(
        here
    )
    assert hub.files == {}
    hub.fail = None
    command = shlex.split(line.split("push it again: ")[1])
    assert command[:3] == ["hf", "upload", f"{USER}/chosen"]
    hf = Path(sys.executable).with_name("hf")
    done = subprocess.run([hf, *command[1:]], env=worker.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.files == {name: content for name, content in here.items() if not name.startswith(("_", "checkpoint-"))}


def test_a_failing_push_of_a_checkpoint_does_not_end_the_training(worker, hub):
    hub.fail, hub.failures = ("/commit/", 500), 1
    code, _, err = worker.run("patient", max_steps=2, save_steps=1, hub_strategy="every_save")
    assert code == 0, err
    assert "a push to the Hub failed, the next one sends its files" in err
    assert hub.commits[-1] == "End of training"
    assert "adapter_model.safetensors" in hub.files


def test_a_push_that_failed_is_told_before_the_next_one_takes_its_place(tmp_path, monkeypatch, caplog):
    trainer, failed = trainer_of(tmp_path), Future()
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: setattr(self, "push_in_progress", None))
    failed.set_exception(OSError(f"no way with {ACCESS_TOKEN}"))
    trainer.push_in_progress = PushInProgress([failed])
    caplog.clear()
    trainer._push_from_checkpoint("checkpoint-2")
    assert trainer.push_in_progress is None
    (record,) = caplog.records
    assert "no way with REDACTED" in record.getMessage()


def test_a_token_that_may_not_write_is_told_before_the_training(worker, hub):
    hub.fail = ("/api/repos/create", 401)
    code, _, err = worker.run("refused")
    assert code == 1
    line = one_line(err)
    assert "push_to_hub=True" in line
    assert "401" in line
    assert "hf auth login" in line
    assert not list((worker.folder / "refused").rglob("adapter_model.safetensors"))


def test_no_hub_is_told_before_the_training(worker, hub):
    hub.fail = ("", 0)  # hangs up on everybody
    code, _, err = worker.run("alone")
    assert code == 1
    assert "push_to_hub=True: cannot make or find the repository" in one_line(err)


def test_offline_is_told_from_python_too(tmp_path):
    with pytest.raises(PushError, match=r"offline.*hf auth login"):
        trainer_of(tmp_path, push_to_hub=True)
