"""How fast it is on a GPU: whole steps beside TRL's trainers, on random models; loss and rollouts have their own
benchmarks, which are started from here."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from correctness import shapes
from models import rows, save_model, tokenizer

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from step import CASES, Pair, measure  # noqa: E402 - benchmarks/step.py


class RandomPair(Pair):
    """Student and teacher of benchmarks/step.py with random weights, and rows of whole length."""

    def __init__(self, folder: Path, tiny: bool, tokens: int) -> None:
        student, teacher = shapes(tiny)
        self.student = save_model(folder / "student", student, 0)
        self.teacher = save_model(folder / "teacher", teacher, 1)
        self.tokenizer, self.tokens = tokenizer(), tokens
        self.batch, self.accumulation = (2, 2) if tiny else (8, 4)
        self.rows = list(rows(64))


def steps(device: str, tiny: bool) -> dict[str, Any]:
    """Seconds per step of each contender, on-policy and on data, and the peak of memory."""
    found: dict[str, Any] = {}
    how = argparse.Namespace(rounds=1, steps=1 if tiny else 2)
    with tempfile.TemporaryDirectory() as folder:
        pair = RandomPair(Path(folder), tiny, tokens=8 if tiny else 128)
        for case in ("on-policy, checkpointing", "data only, checkpointing"):
            assert case in CASES
            for contender in ("gkd", "TRL GKDTrainer", "TRL DistillationTrainer"):
                how.contenders = [contender]
                if device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                seconds = measure(pair, case, how)["seconds"]
                if seconds:
                    one = found.setdefault(case, {}).setdefault(contender, {})
                    one["seconds"] = seconds[contender]
                    one["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return found


def other_benchmark(device: str, tiny: bool, name: str) -> dict[str, Any]:
    """What benchmarks/loss.py or rollout.py writes on this device."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.json")
        small = ["--vocab", "503", "--student-width", "64", "--teacher-width", "96", "--sizes", "64"]
        flags = {
            "loss": ["--repeats", "1" if tiny else "3", "--output", str(output)]
            + (small if tiny else ["--sizes", "1024", "4096"]),
            "rollout": ["--rounds", "1"] + (["--vocab", "503", "--width", "64", "--layers", "2"] if tiny else []),
        }[name]
        run = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--device", device, *flags]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return {"failed": done.stderr.strip().splitlines()[-1:]}
        return dict(json.loads(output.read_text())) if output.exists() else {"table": done.stdout.splitlines()}
