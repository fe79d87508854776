"""Start two processes the way users do, wait for them, and show what they printed when they fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import RANKS, Case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Generous: the machine may be busy with other things. What hangs is seen by the workers' own watch, which is shorter.
LIMIT_S = 900


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without what an outer launcher left, made for two processes on few cores."""
    launcher = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "FSDP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    folders = [str(HERE), str(HERE.parent / "support"), str(ROOT), kept.get("PYTHONPATH", "")]
    return {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")]),  # DeepSpeed wants ninja
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }


def execute(command: Sequence[str], **variables: str) -> str:
    """Run a command to its end and give what it printed.

    Raises:
        AssertionError: it failed or did not end in time; with the end of what it printed.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(**variables),
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the launcher ends its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()
        raise AssertionError(f"{' '.join(command)} did not end within {LIMIT_S} s") from None
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}:\n{output[-12000:]}"
    return output


def launch(
    cases: Sequence[Case],
    models: Path,
    folder: Path,
    options: Sequence[str],
    machines: Sequence[str] = ("--num_machines", "1", "--main_process_port", "0"),
    **variables: str,
) -> str:
    """`accelerate launch` with two processes that run the cases one after the other."""
    command = ["-m", "accelerate.commands.launch", *options, *machines, "--num_processes", str(RANKS)]
    return execute([*command, "--dynamo_backend", "no", *_worker(cases, models, folder)], **variables)


def fork(cases: Sequence[Case], models: Path, folder: Path, **variables: str) -> str:
    """The same on two ranks that are forked from one process, whose slow imports are done once, with no launcher;
    in full precision."""
    return execute(_worker(cases, models, folder), ACCELERATE_MIXED_PRECISION="no", **variables)


def _worker(cases: Sequence[Case], models: Path, folder: Path) -> list[str]:
    """The script of each rank, and what it is to do."""
    plan = folder / "plan.json"
    plan.write_text(
        json.dumps(
            {"cases": [dataclasses.asdict(case) for case in cases], "models": str(models), "folder": str(folder)}
        )
    )
    return [str(HERE / "worker.py"), str(plan), str(LIMIT_S - 60)]
