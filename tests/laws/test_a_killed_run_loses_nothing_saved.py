"""Law 7: a run that was stopped, or killed at any moment, resumes as if it had not been."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resumed import STEPS, STOP, build, history, weights
from safetensors.torch import load_file

from gkd.data.sources import choose_sources
from gkd.training import checkpoint_files as files

SCENES = {
    "data": {"lmbda": 0.0},
    "mixed": {"lmbda": 0.5},
    "student": {"lmbda": 1.0, "mixing": "batch"},
    "middle of an epoch, accumulation": {
        "lmbda": 0.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "rows": 17,
    },
    "end of an epoch": {"lmbda": 0.5, "rows": 20},
    "schedules": {
        "lmbda": "0@0 1@8", "max_new_tokens": "2@0% 7@100%", "temperature": "1.5@0 0.5@9 cosine",
        "beta": "0.1@0 0.9@9", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "rows": 17,
    },
    "teacher's sequences from the cache": {"lmbda": 0.3, "seq_kd": True, "rows": 12},
    "teacher's sequences anew": {"lmbda": 0.3, "seq_kd": True, "teacher_cache_dir": "off", "rows": 12},
    "a teacher with prompts of its own": {"lmbda": 0.4, "seq_kd": True, "views": True},
    "dropout of the adapter": {"lmbda": 0.5, "lora_dropout": 0.3, "rows": 14},
    "dropout, end of an epoch": {"lmbda": 0.0, "lora_dropout": 0.3, "rows": 20},
}  # fmt: skip


def remember(monkeypatch):
    """Every window's sequences after the rollout, as they come."""
    from gkd.training import trainer as module

    windows, original = [], module.count
    original = getattr(original, "original", original)

    def count(sequences):
        windows.append([(s.row, s.source, tuple(s.input_ids)) for s in sequences])
        return original(sequences)

    count.original = original
    monkeypatch.setattr(module, "count", count)
    return windows


@pytest.mark.parametrize("scene", SCENES)
def test_stopped_and_resumed_is_never_stopped(tmp_path, monkeypatch, scene):
    expected = remember(monkeypatch)
    whole = build(tmp_path / "whole", **SCENES[scene])
    whole.train()
    shutil.rmtree(tmp_path / "whole" / "_teacher_sequences", ignore_errors=True)  # the other run samples for itself

    windows = remember(monkeypatch)
    first = build(tmp_path / "parts", **SCENES[scene])

    class Killed(BaseException):
        pass

    def stop(*args, **kwargs):
        if first.state.global_step == STOP:
            raise Killed
        return type(first).training_step(first, *args, **kwargs)

    monkeypatch.setattr(first, "training_step", stop)
    with pytest.raises(Killed):
        first.train()
    assert windows.pop() is not None  # the window that was being trained on is done again
    torch.manual_seed(77)  # a new process has its own random state
    second = build(tmp_path / "parts", **SCENES[scene])
    second.train(resume_from_checkpoint=True)

    assert second.state.global_step == STEPS
    assert windows == expected  # rows, sources and every token, ten windows
    assert history(second) == history(whole)
    assert second.ledger.as_dict() == whole.ledger.as_dict()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_sources_are_those_of_seed_and_step(tmp_path, monkeypatch):
    """The oracle of the above: not merely equal to each other."""
    windows = remember(monkeypatch)
    build(tmp_path, max_steps=4, save_steps=2, lmbda=0.5).train()
    windows.clear()
    shutil.rmtree(tmp_path / "checkpoint-4")
    build(tmp_path, max_steps=4, save_steps=2, lmbda=0.5).train(resume_from_checkpoint=True)
    for step, window in zip((2, 3), windows, strict=True):
        assert [source for _, source, _ in window] == choose_sources(5, step, len(window), 0.5, False, "sample")


def test_a_finished_run_does_nothing_more(tmp_path):
    """Ten steps end in the middle of an epoch of four."""
    whole = build(tmp_path, max_steps=6, save_steps=2, lmbda=0.0)
    whole.train()
    saved = (tmp_path / "checkpoint-6" / files.STATE_FILE).stat().st_mtime_ns
    again = build(tmp_path, max_steps=6, save_steps=2, lmbda=0.0)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert history(again) == history(whole)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    assert (tmp_path / "checkpoint-6" / files.STATE_FILE).stat().st_mtime_ns == saved


def test_what_a_signal_saves_is_to_be_gone_on_from(tmp_path):
    """Also where a run saves models alone: the line it ends with says how to go on."""
    import signal

    from transformers import TrainerCallback

    from gkd.common.errors import TrainingStopped

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

    values = {"max_steps": 3, "save_steps": 1, "lmbda": 0.0, "save_only_model": True}
    trainer = build(tmp_path, **values)
    trainer.add_callback(Stop())
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert trainer.args.save_only_model
    resumed = build(tmp_path, **values)
    resumed.train(resume_from_checkpoint=True)
    never = build(tmp_path / "never", **values)
    never.train()
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(never).items())


# -------------------------------------------------------------------------------- `kill -9`, again and again

HERE = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """24 kills of one training, then the rest of it; and the same training never killed."""
    work = tmp_path_factory.mktemp("kill")
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_worker.py"), str(work)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return work, json.loads((work / "result.json").read_text())


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(killed):
    kills = killed[1]["kills"]
    assert len(kills) >= 20
    assert {"save", "step", "student's rollout", "clock"} <= {kill["phase"] for kill in kills}
    assert killed[1]["cut_off"] > 0, "no save was ever cut off: these kills show nothing"
    assert killed[1]["warned"] > 0, "a checkpoint that was cut off is warned of"
    assert max(kill["saved"] for kill in kills) > min(kill["saved"] for kill in kills)


@pytest.mark.slow
def test_the_end_is_that_of_the_run_never_killed(killed):
    work = killed[0]
    results = [load_file(work / name / "checkpoint-40" / "model.safetensors") for name in ("killed", "never")]
    assert results[0].keys() == results[1].keys()
    assert all((value == results[1][name]).all() for name, value in results[0].items())
    states = [
        json.loads((work / name / "checkpoint-40" / "gkd_state.json").read_text()) for name in ("killed", "never")
    ]
    assert states[0]["ledger"] == states[1]["ledger"]
    assert states[0]["num_tokens"] == states[1]["num_tokens"]


@pytest.mark.slow
def test_only_what_the_limit_allows_is_left(killed):
    names = {path.name for path in (killed[0] / "killed").glob("checkpoint-*")}
    assert names == {"checkpoint-39", "checkpoint-40"}
