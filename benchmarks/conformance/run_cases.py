"""Cases about whole runs: resumed, evaluated along, on two ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance import definition, material
from conformance.definition import Trained
from conformance.material import Run
from conformance.result import Case, Result, judged
from conformance.step_cases import SAME, judged_step, targets
from conformance.watch import rows_of, train

WORKER = Path(__file__).with_name("run.py")


def _share(adapter: Any) -> float:
    """Half of the rows are the student's own, where a trainer mixes."""
    return 1.0 if adapter.prompts_only else 0.5


def _long(adapter: Any, folder: str, **options: Any) -> Run:
    return Run(
        folder=folder, conversations=material.rows(16), share=_share(adapter), learning_rate=0.05, steps=4, **options
    )


def _difference(one: Tensor, other: Tensor, size: float) -> float:
    return float((one - other).norm()) / size


def resumed(adapter: Any) -> Result:
    """Two steps, a checkpoint, a new process's worth of trainer, two more: the weights of four steps in one go."""
    with tempfile.TemporaryDirectory() as folder:
        whole = train(adapter, _long(adapter, f"{folder}/whole"))
        train(adapter, _long(adapter, f"{folder}/part", save_steps=2))
        torch.manual_seed(99)
        again = _long(adapter, f"{folder}/part", resume=f"{folder}/part/checkpoint-2")
        second = train(adapter, again)
    error = _difference(second.after, whole.after, float(whole.change.norm()))
    return judged(error < SAME, f"off by {error:.2g} of the way that the weights went")


def evaluated(adapter: Any) -> Result:
    """An evaluation after every step leaves the training what it would have been."""
    with tempfile.TemporaryDirectory() as folder:
        alone = train(adapter, _long(adapter, f"{folder}/alone"))
        along = train(adapter, _long(adapter, f"{folder}/along", eval_conversations=material.rows(3)))
    error = _difference(along.after, alone.after, float(alone.change.norm()))
    return judged(error < SAME, f"off by {error:.2g} of the way that the weights went")


def _two_ranks(adapter: Any, share: float) -> Result:
    """One step on two processes of two rows each, against the definition on the rows of both."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.trainer(_two_rank_run(folder, share))  # what it has not it says here
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        workers = [
            subprocess.Popen(
                [sys.executable, str(WORKER), "--rank-of", adapter.module, "--share", str(share), "--into", folder],
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [worker.communicate()[1] for worker in workers]
        if any(worker.returncode for worker in workers):
            last = [line for line in errors[0].splitlines() if "Error" in line][-1:]
            return Result("fail", f"it did not run: {last}"[:160])
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    sequences = [tuple(ids) for part in found for ids in part["sequences"]]
    run = _two_rank_run(folder, share)
    prompts = [tuple(prompt) for prompt in run.prompts()]
    rows = [Trained(ids, len(p)) for ids in sequences for p in prompts if ids[: len(p)] == p]
    wrong = "" if len(rows) == 4 else f"{len(rows)} rows trained on, four given"
    if not torch.allclose(found[0]["change"], found[1]["change"]):
        wrong = "the ranks went different ways"
    rows = targets(rows)
    wanted = definition.step(run.student, run.teacher, rows, run.beta)
    return judged_step(found[0]["change"], rows, wanted, wrong)


def _two_rank_run(folder: str, share: float) -> Run:
    return Run(folder=folder, share=share, batch=2)


def rank(adapter: Any, share: float, folder: str) -> None:
    """What one of the two processes does."""
    run = _two_rank_run(f"{folder}/run", share)
    seen = train(adapter, run)
    _, wrong = rows_of(seen, run)
    assert not wrong, wrong
    kept = {"sequences": [list(ids) for ids in seen.sequences], "change": seen.change}
    torch.save(kept, Path(folder) / f"{os.environ['RANK']}.pt")


def two_ranks_fixed(adapter: Any) -> Result:
    """The rows' answers on two ranks: the step of all four rows."""
    return _two_ranks(adapter, 0.0)


def two_ranks_own(adapter: Any) -> Result:
    """The student's own answers on two ranks."""
    return _two_ranks(adapter, 1.0)


GROUP = "Whole runs"
CASES = [
    Case("two ranks, the rows' answers", GROUP, two_ranks_fixed, cheap=False),
    Case("two ranks, own answers", GROUP, two_ranks_own, cheap=False),
    Case("resumed as if never stopped", GROUP, resumed),
    Case("evaluation does not shift the training", GROUP, evaluated),
]
