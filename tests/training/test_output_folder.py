"""The output folder belongs to one run at a time, and nothing in it goes unasked."""

import fcntl
import json
import os
import signal
import time

import pytest
from forked import Child
from training import trainer_of

from gkd.common.errors import DiskFullError
from gkd.training import checkpoint_files as files
from gkd.training import output_folder

SAVING = {"save_strategy": "steps", "save_steps": 1, "lmbda": 0.0, "optim": "adamw_torch", "learning_rate": 1e-3}


def steps_in(folder):
    return [files.step_of(path) for path in files.checkpoints(folder)]


# ------------------------------------------------------------------------------------------------- the lock


def hold(folder):
    def work(say):
        with output_folder.locked(str(folder)):
            say("locked")
            time.sleep(300)

    return work


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
    first = Child(hold(tmp_path), tmp_path / "first.txt")
    assert first.wait_for("locked")
    with pytest.raises(ValueError, match="in use by another run") as error, output_folder.locked(str(tmp_path)):
        pass
    assert f"process {first.pid}" in str(error.value)
    trainer = trainer_of(tmp_path, **SAVING)
    with pytest.raises(ValueError, match="in use by another run"):
        trainer.train()
    assert steps_in(tmp_path) == []
    first.send(signal.SIGKILL)  # however it ends, the folder is free
    first.join()
    trainer.train()
    assert steps_in(tmp_path) == [1]


def test_the_lock_may_be_entered_again_and_is_not_a_childs(tmp_path):
    folder = str(tmp_path)
    with output_folder.locked(folder):
        with output_folder.locked(folder + "/../" + tmp_path.name):
            pass
        # the inner one has not let go of it
        other = Child(lambda say: say(_try(folder)), tmp_path / "other.txt")
        assert other.join() == 0
        assert other.lines == ["refused"]
    with open(tmp_path / output_folder.LOCK_FILE, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _try(folder):
    try:
        with output_folder.locked(folder):
            return "locked"
    except ValueError:
        return "refused"


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    def work(say):
        with output_folder.locked(str(tmp_path)):
            worker = os.fork()
            if worker == 0:
                time.sleep(300)
                os._exit(0)
            say(str(worker))
            os.kill(os.getpid(), signal.SIGKILL)

    run = Child(work, tmp_path / "run.txt")
    worker = int(run.wait_for())
    os.waitpid(run.pid, 0)
    try:
        with output_folder.locked(str(tmp_path)):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


# ------------------------------------------------------------------------------------- checkpoints of another run


@pytest.fixture
def finished(tmp_path):
    trainer_of(tmp_path / "run", max_steps=3, **SAVING).train()
    return tmp_path / "run"


def test_another_runs_checkpoints_are_neither_mixed_with_nor_deleted(finished):
    second = trainer_of(finished, max_steps=2, save_total_limit=1, **SAVING)
    with pytest.raises(ValueError, match="holds checkpoints of another run") as error:
        second.train()
    for part in ("checkpoint-1", "checkpoint-3", "resume_from_checkpoint=true", "overwrite_output_dir=true"):
        assert part in str(error.value)
    assert steps_in(finished) == [1, 2, 3]


def test_they_are_deleted_when_that_was_said(finished):
    trainer_of(finished, max_steps=2, overwrite_output_dir=True, **SAVING).train()
    assert steps_in(finished) == [1, 2]
    again = trainer_of(finished, max_steps=3, overwrite_output_dir=True, **SAVING)
    with pytest.raises(ValueError, match="overwrite_output_dir"):
        again.train(resume_from_checkpoint=True)
    assert steps_in(finished) == [1, 2]


def test_the_same_trainer_trains_on_and_a_resumed_one_is_of_the_same_run(finished):
    resumed = trainer_of(finished, max_steps=5, save_total_limit=2, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert steps_in(finished) == [4, 5]  # the limit counts what the run had saved before it was resumed
    resumed.train()
    assert max(steps_in(finished)) == 5


def test_the_limit_leaves_other_runs_alone(finished, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    trainer_of(elsewhere, max_steps=1, **{**SAVING, "seed": 7}).train()
    os.rename(elsewhere / "checkpoint-1", finished / "checkpoint-9")
    run = files.run_of(finished / "checkpoint-1")
    files.rotate(finished, 1, [], run)
    assert steps_in(finished) == [3, 9]


def test_what_was_cut_off_is_nobodys(finished):
    """A run that is killed in its first save leaves a folder that no later one knows."""
    files.begin(finished / "checkpoint-7", "another")
    (finished / "checkpoint-8").mkdir()
    files.rotate(finished, 2, [], files.run_of(finished / "checkpoint-1"))
    assert steps_in(finished) == [2, 3]


def test_cut_off_checkpoints_are_no_obstacle(tmp_path):
    files.begin(tmp_path / "checkpoint-1", "another")
    trainer_of(tmp_path, **SAVING).train()
    assert files.fault_of(tmp_path / "checkpoint-1") is None


# --------------------------------------------------------------------------------------- things of another kind


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [
        ("README.md", True),
        ("evaluation.json", True),
        ("metrics.jsonl", True),
        ("plots", False),
        ("checkpoint-4", False),
    ],
)
def test_what_stands_in_the_way_is_told_before_anything_is_loaded(tmp_path, name, is_folder):
    path = tmp_path / name
    path.mkdir() if is_folder else path.write_text("x")
    with pytest.raises(ValueError, match="move it away") as error:
        output_folder.make(str(tmp_path))
    assert name in str(error.value)


def test_a_linked_checkpoint_is_let_go_and_not_followed(finished, tmp_path):
    os.rename(finished / "checkpoint-2", tmp_path / "kept")
    (finished / "checkpoint-2").symlink_to(tmp_path / "kept")
    files.discard(finished / "checkpoint-2")
    assert not (finished / "checkpoint-2").is_symlink()
    assert files.fault_of(tmp_path / "kept") is None


# -------------------------------------------------------------------------------------------- results set aside


def test_results_of_earlier_weights_are_set_aside(tmp_path):
    (tmp_path / "evaluation.json").write_text("1")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_text("1")
    assert output_folder.set_results_aside(str(tmp_path)) == ["evaluation.json", "plots"]
    (tmp_path / "evaluation.json").write_text("2")
    assert output_folder.set_results_aside(str(tmp_path)) == ["evaluation.json"]
    assert (tmp_path / "_earlier" / "evaluation.json").read_text() == "2"
    assert (tmp_path / "_earlier" / "plots" / "loss.png").read_text() == "1"
    assert not (tmp_path / "evaluation.json").exists()


def test_what_a_rank_cannot_see_is_told(tmp_path):
    token = output_folder.new_run()
    path = output_folder.mark(str(tmp_path), token)
    assert output_folder.sees(str(tmp_path), token, 0)
    path.unlink()
    assert not output_folder.sees(str(tmp_path), token, 0)


def test_the_lock_says_nothing_to_the_hub_and_a_full_disk_is_told(tmp_path, monkeypatch):
    assert output_folder.LOCK_FILE.startswith("_")  # the Trainer leaves such files out of what it pushes

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(DiskFullError), output_folder.locked(str(tmp_path)):
        pass
    monkeypatch.undo()
    with output_folder.locked(str(tmp_path)):
        pass
