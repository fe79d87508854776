"""What happens to one rank, and what all of them do: a signal, a loss that is not finite, a death."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch import HERE, LIMIT_S, ROOT, environment, execute
from tiny import save_tiny, tiny_rows

from gkd.training.checkpoint_files import find, step_of

pytestmark = pytest.mark.distributed

# torch's launcher ends the other ranks with SIGTERM, and with SIGKILL after 30 seconds; the rest is a busy machine.
DEAD_RANK_S = 120
SKIPS = [f"skip_{name}" for name in ("ddp", "ddp_bf16", "zero2", "zero3", "zero2_bf16", "zero3_bf16")]


@pytest.fixture(scope="module")
def results(operators: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each scene of rank_worker.py came to."""
    folder = tmp_path_factory.mktemp("ranks")
    execute([str(HERE / "rank_worker.py"), str(folder)])
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}


def last_lines(children: list[dict[str, Any]]) -> list[Any]:
    assert [child["code"] for child in children] == [0, 0], children[0]["said"] + children[1]["said"]
    return [json.loads(child["lines"][-1]) for child in children]


def test_ranks_stop_at_the_same_step_whichever_was_told(results: dict[str, Any]) -> None:
    stopped, (checkpoint, files), again, never = results["one_rank_is_told_to_stop"]
    assert [child["code"] for child in stopped] == [143, 143]
    assert step_of(checkpoint) == 3
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "model.safetensors"} <= set(files)
    told = [child["said"].count("stopped by SIGTERM after step 3 of 6") for child in stopped]
    assert told == [1, 0]
    resumed, expected = last_lines(again), last_lines(never)
    assert resumed[0]["step"] == 6
    assert resumed == expected


@pytest.mark.parametrize("scene", SKIPS)
def test_all_ranks_skip_the_step(results: dict[str, Any], scene: str) -> None:
    first, second = last_lines(results[scene])
    assert first == second
    assert first["finite"]
    assert first["nonfinite"] == 1
    assert sum(first["ledger"]["sequences"].values()) == 3 * 4  # three steps of four rows were trained on
    rates = [0.01 * (4 - step) / 4 for step in (0, 2, 3)]  # of the logs that have a loss: the skipped step has none
    assert first["learning_rates"] == pytest.approx(rates)  # but counts for the schedule
    said = [child["said"] for child in results[scene]]
    assert ["step 2 is skipped: its loss is not finite" in text for text in said] == [False, True]


@pytest.mark.parametrize("scene", SKIPS)
def test_zero_and_ddp_skip_alike(results: dict[str, Any], scene: str) -> None:
    ddp, other = (last_lines(results[name])[0] for name in ("skip_ddp", scene))
    assert ddp["weights"] == pytest.approx(other["weights"], rel=1e-2 if "bf16" in scene else 1e-6)


@pytest.mark.parametrize("scene", ["nothing_ddp", "nothing_zero2", "nothing_zero3"])
def test_a_step_without_a_target_on_any_rank_is_left_out(results: dict[str, Any], scene: str) -> None:
    first, second = last_lines(results[scene])
    assert first == second
    assert (first["empty"], first["nonfinite"]) == (1, 0)
    assert sum(first["ledger"]["sequences"].values()) == 4 + 0 + 2 + 4
    assert len(first["learning_rates"]) == 3  # the logs that have a loss
    assert first["learning_rates"] == pytest.approx([0.01, 0.005, 0.0025])
    ddp = last_lines(results["nothing_ddp"])[0]
    assert first["weights"] == pytest.approx(ddp["weights"], rel=1e-6)  # DDP leaves out the optimizer's step itself


def test_the_others_do_not_wait_for_a_dead_rank(results: dict[str, Any]) -> None:
    survivor, dead, facts = results["one_rank_dies"]
    assert dead["code"] == 7
    assert survivor["code"] == 1
    assert "Connection closed by peer" in survivor["said"] or "Connection reset by peer" in survivor["said"]
    assert step_of(facts["newest"]) == 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_foreign_is_unpickled_under_zero(results: dict[str, Any], stage: int) -> None:
    """DeepSpeed would load the states with pickle; a real checkpoint passes, and a new learning rate holds."""
    first, again, name, foreign, ran = results[f"foreign_zero{stage}"]
    assert [child["code"] for child in first] == [0, 0], first[0]["said"] + first[1]["said"]
    rates = last_lines(again)[0]["learning_rates"]
    assert rates[-2:] == pytest.approx([1e-3 * 2 / 4, 1e-3 * 1 / 4])  # linear, steps 3 and 4
    assert [child["code"] for child in foreign] == [1, 1]
    for child in foreign:
        assert "ValueError" in child["said"]
        assert name in child["said"]
        assert "it is not loaded" in child["said"]
    assert not ran


def test_ranks_that_were_started_otherwise_do_not_train(results: dict[str, Any]) -> None:
    children = results["one_rank_is_started_otherwise"]
    assert [child["code"] for child in children] == [0, 0], children[0]["said"] + children[1]["said"]
    told = [dict(line.split(": ", 1) for line in child["lines"]) for child in children]
    assert told[0].keys() == told[1].keys()
    assert told[0].pop("nothing") == told[1].pop("nothing") == "nothing"
    for about in told:
        assert "must be shared by all machines" in about.pop("folders")
        for name, text in about.items():
            field = "rows" if name == "order" else name
            assert text.startswith("ranks 0 and 1 were started with different things ("), text
            assert f"{field} " in text
    assert "lmbda 0.5 -> 0.25" in told[0]["lmbda"]


def newest_step(folder: Path) -> int:
    found = find(folder)
    return 0 if found is None else step_of(found)


def launched(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """The recipe under `accelerate launch`: two processes, a checkpoint after every step, going on where one is."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--main_process_port", "0", "--dynamo_backend", "no", "--mixed_precision", "no"]
    command += ["--multi_gpu", "recipes/gkd_qwen2.py"]
    values: dict[str, Any] = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "out",
        "max_steps": 100000,
        "per_device_train_batch_size": 2,
        "max_new_tokens": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "evaluate_before_and_after": "false",
        "report_to": "none",
        "resume_from_checkpoint": "true",
    }
    command += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment())


def after_two_more_steps(folder: Path, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Launch, and wait until two more steps have been saved; gives the newest then."""
    start = newest_step(folder / "out")
    process = launched(folder, log)
    end = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < end and newest_step(folder / "out") < start + 2:
        time.sleep(0.2)
    reached = newest_step(folder / "out")
    if reached < start + 2:
        process.kill()
    assert reached >= start + 2, log.read_text()[-4000:]
    return process, reached


def rank_of(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """That one of the launcher's processes."""
    found = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == str(rank)]
    assert len(found) == 1, found
    return found[0]


def test_a_launched_run_survives_a_killed_rank_and_a_signal(tmp_path: Path) -> None:
    """`accelerate launch`: a rank is killed, the others end and the launcher names it; the same command goes on. A
    SIGTERM is handed on: the ranks save, and end. The launcher is killed: the ranks end with it."""
    save_tiny(tmp_path / "student", seed=1)
    save_tiny(tmp_path / "teacher", seed=2, hidden=48, layers=3)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(16)))

    process, reached = after_two_more_steps(tmp_path, tmp_path / "killed.txt")
    victim, survivor = rank_of(process, 1), rank_of(process, 0)
    victim.kill()
    assert process.wait(timeout=DEAD_RANK_S) == 1
    assert not survivor.is_running()
    text = (tmp_path / "killed.txt").read_text()
    assert f"Signal 9 (SIGKILL) received by PID {victim.pid}" in text, text[-4000:]
    assert newest_step(tmp_path / "out") >= reached

    process, reached = after_two_more_steps(tmp_path, tmp_path / "stopped.txt")
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=120)
    text = (tmp_path / "stopped.txt").read_text()
    assert code != 0
    assert text.count("stopped by SIGTERM after step") == 1, text[-4000:]
    assert "forcefully exiting" not in text
    assert f"after step {newest_step(tmp_path / 'out')} of" in text
    assert newest_step(tmp_path / "out") >= reached

    process, reached = after_two_more_steps(tmp_path, tmp_path / "orphans.txt")
    orphans = [rank_of(process, 0), rank_of(process, 1)]
    process.kill()  # the launcher, which cannot hand that on
    process.wait()
    _, alive = psutil.wait_procs(orphans, timeout=DEAD_RANK_S)
    assert not alive, "ranks outlive their launcher"
    assert newest_step(tmp_path / "out") >= reached
