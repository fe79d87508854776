"""Checkpoint files: which one is complete and gone on from, which are deleted, and damage of every kind."""

import json
import logging
import shutil

import pytest
from resumed import build, history

from gkd.training import checkpoint_files as files

# -------------------------------------------------------------------------------------- which one is resumed from


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """checkpoint-2, -4 and -6 of one run."""
    folder = tmp_path_factory.mktemp("three")
    build(folder, max_steps=6, save_steps=2, lmbda=0.0).train()
    return folder


@pytest.fixture
def run_folder(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


FAULTS = {
    "killed before the end": lambda c: files._write(c / files.STATE_FILE, {"complete": False}),
    "weights cut": lambda c: cut_off(c / "model.safetensors"),
    "optimizer cut": lambda c: cut_off(c / "optimizer.pt"),
    "random state lost": lambda c: (c / "rng_state.pth").unlink(),
    "scheduler lost": lambda c: (c / "scheduler.pt").unlink(),
    "state file cut": lambda c: cut_off(c / files.STATE_FILE),
    "state file empty": lambda c: (c / files.STATE_FILE).write_text(""),
    "empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cut_off_checkpoint_is_skipped_with_a_warning(run_folder, caplog, fault):
    FAULTS[fault](run_folder / "checkpoint-6")
    with caplog.at_level(logging.WARNING, "gkd"):
        assert files.find(run_folder) == str(run_folder / "checkpoint-4")
    assert "checkpoint-6 is left out: it" in caplog.text
    FAULTS[fault](run_folder / "checkpoint-4")
    assert files.find(run_folder) == str(run_folder / "checkpoint-2")


def test_no_complete_checkpoint(run_folder, tmp_path):
    assert files.find(tmp_path / "nowhere") is None
    for path in run_folder.glob("checkpoint-*"):
        (path / "model.safetensors").unlink()
    assert files.find(run_folder) is None
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        build(run_folder).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"checkpoint-4' is not complete \(its model.safetensors is missing\)"):
        build(run_folder).train(resume_from_checkpoint=str(run_folder / "checkpoint-4"))


def test_a_readme_and_further_files_do_not_matter(run_folder):
    (run_folder / "checkpoint-6" / "README.md").write_text("my notes")
    (run_folder / "checkpoint-6" / "notes.txt").write_text("more notes")
    assert files.find(run_folder) == str(run_folder / "checkpoint-6")


def test_checkpoints_of_other_programs(run_folder, caplog):
    """TRL and transformers write no marker: their files are looked at."""
    for path in run_folder.glob("checkpoint-*"):
        (path / files.STATE_FILE).unlink()
    assert files.find(run_folder) == str(run_folder / "checkpoint-6")
    assert "was not saved by gkd" in caplog.text
    state = run_folder / "checkpoint-6" / files.TRAINER_STATE
    text = state.read_text()
    for broken in (text[: len(text) // 2], "{}", "[]"):
        state.write_text(broken)
        assert files.find(run_folder) == str(run_folder / "checkpoint-4")
    state.write_text(text)
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
        path = run_folder / "checkpoint-6" / name
        content = path.read_bytes()
        path.write_bytes(content[:-10])
        assert files.find(run_folder) == str(run_folder / "checkpoint-4"), name
        path.write_bytes(content)
    assert files.find(run_folder) == str(run_folder / "checkpoint-6")
    trainer = build(run_folder, max_steps=7, lmbda=0.0)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7


def test_the_last_saved_counts_not_the_highest_number(run_folder):
    """Going on from an older checkpoint makes the later ones those of a run that is no more."""
    trainer = build(run_folder, max_steps=3, save_steps=1, lmbda=0.0)
    trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-2"))
    assert files.find(run_folder) == str(run_folder / "checkpoint-3")


# ------------------------------------------------------------------------------------------- save_total_limit


def steps_in(folder):
    return [files.step_of(path) for path in files.checkpoints(folder)]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_counts_complete_checkpoints(tmp_path, limit):
    trainer = build(tmp_path, max_steps=4, save_steps=1, save_total_limit=limit, lmbda=0.0)
    trainer.train()
    assert steps_in(tmp_path) == [1, 2, 3, 4][-limit:]
    assert trainer.args.save_total_limit == limit


def test_the_limit_never_deletes_the_last_complete_one(run_folder):
    FAULTS["weights cut"](run_folder / "checkpoint-6")
    files.rotate(run_folder, 1, [])
    assert steps_in(run_folder) == [4]
    assert files.fault_of(run_folder / "checkpoint-4") is None
    for limit in (None, 0, 5):
        files.rotate(run_folder, limit, [])
        assert steps_in(run_folder) == [4]


def test_a_kill_between_deleting_and_saving_leaves_a_complete_one(tmp_path, monkeypatch):
    """With save_total_limit=1, at every moment of the run there is something to resume from."""
    trainer = build(tmp_path, max_steps=3, save_steps=1, save_total_limit=1, lmbda=0.0)
    seen = []
    for name in ("begin", "finish", "discard"):
        original = getattr(files, name)

        def watched(folder, *rest, original=original):
            before = files.newest(tmp_path)[0]
            original(folder, *rest)
            after = files.newest(tmp_path)[0]
            seen.append((before, after))

        monkeypatch.setattr(files, name, watched)
    trainer.train()
    first = next(i for i, (_, after) in enumerate(seen) if after is not None)
    assert len(seen) > 6
    assert all(before is not None and after is not None for before, after in seen[first + 1 :])


def test_the_best_and_the_one_just_saved_are_kept(run_folder):
    files.rotate(run_folder, 1, [str(run_folder / "checkpoint-2"), str(run_folder / "checkpoint-4")])
    assert steps_in(run_folder) == [2, 4, 6]
    files.rotate(run_folder, 1, [str(run_folder / "checkpoint-2")])
    assert steps_in(run_folder) == [2, 6]


def test_half_deleted_is_not_complete(run_folder, monkeypatch):
    """rmtree may be killed, too: what says that the folder is complete goes first."""
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)
    files.discard(run_folder / "checkpoint-6")
    assert files.fault_of(run_folder / "checkpoint-6") == "its save was cut off"


def test_the_state_file_lists_every_file(three):
    for folder in three.glob("checkpoint-*"):
        state = json.loads((folder / files.STATE_FILE).read_text())
        listed = {folder / name for name in state["files"]}
        assert listed == {
            p for p in folder.rglob("*") if p.is_file() and p.name != files.STATE_FILE and p.suffix != ".md"
        }
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
            state["files"]
        )


# ------------------------------------------------------------------------------------------ the order of saves, damage


def test_a_clock_that_goes_backwards_does_not_matter(tmp_path, monkeypatch):
    """Every save of this run is an hour before the one before it; foreign ones have nothing but their time."""
    import time

    clock = [2e9]

    def backwards():
        clock[0] -= 3600
        return clock[0]

    monkeypatch.setattr(time, "time", backwards)
    trainer = build(tmp_path, max_steps=5, save_steps=1, save_total_limit=2, lmbda=0.0)
    trainer.train()
    assert steps_in(tmp_path) == [4, 5]
    assert files.find(tmp_path) == str(tmp_path / "checkpoint-5")
    resumed = build(tmp_path, max_steps=6, save_steps=1, save_total_limit=2, lmbda=0.0)
    resumed.train(resume_from_checkpoint=True)
    assert steps_in(tmp_path) == [5, 6]
    assert files.number_of(tmp_path / "checkpoint-6") == files.number_of(tmp_path / "checkpoint-5") + 1


def test_a_checkpoint_from_elsewhere_counts_on(run_folder, tmp_path):
    """Gone on from in another folder, the number still grows: it may be copied back."""
    trainer = build(tmp_path / "other", max_steps=7, save_steps=7, lmbda=0.0)
    trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-6"))
    assert files.number_of(tmp_path / "other" / "checkpoint-7") > files.number_of(run_folder / "checkpoint-6")


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit": flipped,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "gkd_state.json"],
)
def test_damage_that_keeps_the_size_is_found(run_folder, caplog, name, how):
    DAMAGE[how](run_folder / "checkpoint-6" / name)
    assert files.find(run_folder, contents=True) == str(run_folder / "checkpoint-4")
    assert f"checkpoint-6 is left out: its {name}" in caplog.text


def test_a_damaged_checkpoint_is_not_gone_on_from(run_folder):
    flipped(run_folder / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged"):
        build(run_folder, max_steps=7, lmbda=0.0).train(resume_from_checkpoint=str(run_folder / "checkpoint-6"))
    trainer = build(run_folder, max_steps=5, save_steps=1, lmbda=0.0)
    trainer.train(resume_from_checkpoint=True)
    assert history(trainer)[-1]["step"] == 5
    assert [entry["step"] for entry in history(trainer)] == [1, 2, 3, 4, 5]  # from 4


WRONG_STATES = [
    "[]", "null", "3", '"text"', "{}" * 2, "[" * 100_000, '{"complete": "yes"}', '{"complete": true}',
    '{"complete": true, "files": []}', '{"complete": true, "files": {"a": "b"}}',
    '{"complete": true, "files": {"a": [1]}}',
    '{"complete": true, "files": {}, "saved": "now"}', '{"complete": true, "files": {}, "number": null}',
    '{"complete": true, "files": {}, "ledger": []}', '{"complete": true, "files": {}, "ledger": {"sequences": 1}}',
    '{"complete": true, "files": {"../../x": [1, 1]}}', '{"complete": true, "files": {}, "run": 5}',
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG_STATES, ids=range(len(WRONG_STATES)))
def test_any_other_content_of_the_state_file(run_folder, text):
    (run_folder / "checkpoint-6" / files.STATE_FILE).write_text(text)
    assert files.find(run_folder, contents=True) == str(run_folder / "checkpoint-4")
    files.rotate(run_folder, 2, [])
    assert 4 in steps_in(run_folder)
    (run_folder / "checkpoint-4" / files.STATE_FILE).write_text(text)
    if 2 in steps_in(run_folder):
        assert files.find(run_folder, contents=True) == str(run_folder / "checkpoint-2")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        '{"global_step": "6"}',
        '{"global_step": 6, "log_history": 5}',
        '{"global_step": 6, "x": 1}',
        '{"global_step": 5}',
    ],
)
def test_any_other_content_of_the_trainers_state(run_folder, text):
    for path in run_folder.glob("checkpoint-*"):
        (path / files.STATE_FILE).unlink()  # as TRL leaves it
    (run_folder / "checkpoint-6" / files.TRAINER_STATE).write_text(text)
    assert files.find(run_folder) == str(run_folder / "checkpoint-4")


# ----------------------------------------------------------------------------------------------- a model and no more


def test_weights_alone_are_not_gone_on_from(tmp_path):
    values = {"max_steps": 4, "save_steps": 2, "lmbda": 0.0, "save_only_model": True, "save_total_limit": 1}
    build(tmp_path, **values).train()
    assert steps_in(tmp_path) == [4]  # they count as checkpoints all the same
    for wanted in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(ValueError, match="save_only_model"):
            build(tmp_path, **values).train(resume_from_checkpoint=wanted)
    with pytest.raises(ValueError, match="save_only_model"):
        build(tmp_path, **values, resume_from_checkpoint="true").asked_checkpoint()
