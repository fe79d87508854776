"""What happens to one rank, and what all of them do: a signal, a loss that is not finite, a death."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launch import HERE, LIMIT_S, ROOT, environment, execute
from tiny import save_tiny, tiny_rows

from gkd.checkpoint_files import find, step_of

pytestmark = pytest.mark.distributed


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


@pytest.mark.parametrize("scene", ["one_rank_has_no_finite_loss", "the_same_under_zero"])
def test_all_ranks_skip_the_step(results: dict[str, Any], scene: str) -> None:
    first, second = last_lines(results[scene])
    assert first == second
    assert first["finite"]
    assert first["nonfinite"] == 1
    assert sum(first["ledger"]["sequences"].values()) == 3 * 4  # three steps of four rows were trained on
    rates = [0.01 * (4 - step) / 4 for step in range(4)]
    assert first["learning_rates"] == pytest.approx(rates)  # the skipped step counts for the schedule
    said = [child["said"] for child in results[scene]]
    assert ["step 2 is skipped: its loss is not finite" in text for text in said] == [False, True]


def test_zero_and_ddp_skip_alike(results: dict[str, Any]) -> None:
    ddp, zero = (last_lines(results[name])[0] for name in ("one_rank_has_no_finite_loss", "the_same_under_zero"))
    assert ddp["weights"] == pytest.approx(zero["weights"], rel=1e-6)


def test_the_others_do_not_wait_for_a_dead_rank(results: dict[str, Any]) -> None:
    survivor, dead, facts = results["one_rank_dies"]
    assert dead["code"] == 7
    assert survivor["code"] == 1
    assert "Connection closed by peer" in survivor["said"] or "Connection reset by peer" in survivor["said"]
    assert step_of(facts["newest"]) == 2


def test_a_launched_run_is_stopped_and_started_again(tmp_path: Path) -> None:
    """`accelerate launch` hands the signal on; its ranks save, and the same command goes on."""
    save_tiny(tmp_path / "student", seed=1)
    save_tiny(tmp_path / "teacher", seed=2, hidden=48, layers=3)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(16)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--main_process_port", "0", "--dynamo_backend", "no", "--mixed_precision", "no"]
    command += ["--multi_gpu", "recipes/gkd_qwen2.py"]
    values: dict[str, Any] = {
        "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
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
    before = 0
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment())
        end = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < end:
            found = find(tmp_path / "out")
            before = 0 if found is None else step_of(found)
            if before >= 2:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=120)
    text = log.read_text()
    assert before >= 2, text[-4000:]
    assert code != 0
    assert text.count("stopped by SIGTERM after step") == 1, text[-4000:]
    assert "forcefully exiting" not in text
    found = find(tmp_path / "out")
    assert found is not None
    assert f"after step {step_of(found)} of" in text
    assert step_of(found) >= before
