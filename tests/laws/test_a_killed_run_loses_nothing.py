"""Law 7, the other half: `kill -9` at any moment, again and again, and the run is still the one never killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

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


def test_killed_at_every_kind_of_moment(killed):
    kills = killed[1]["kills"]
    assert len(kills) >= 20
    assert {"save", "step", "student's rollout", "clock"} <= {kill["phase"] for kill in kills}
    assert killed[1]["cut_off"] > 0, "no save was ever cut off: these kills show nothing"
    assert killed[1]["warned"] > 0, "a checkpoint that was cut off is warned of"
    assert max(kill["saved"] for kill in kills) > min(kill["saved"] for kill in kills)


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


def test_only_what_the_limit_allows_is_left(killed):
    names = {path.name for path in (killed[0] / "killed").glob("checkpoint-*")}
    assert names == {"checkpoint-39", "checkpoint-40"}
