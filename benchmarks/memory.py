"""The memory that `gkd plan` predicts beside the peak that a run reaches, each in a fresh process.

    python benchmarks/memory.py            # SmolLM2-135M pair, a few minutes
    python benchmarks/memory.py --model glass

On a CPU the peak is the process's resident set (ru_maxrss); on CUDA it is what torch allocated, without the context.
Results are written to benchmarks/results/memory_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES: dict[str, dict[str, Any]] = {
    "LoRA, on-policy, batch 4": {"lmbda": 1.0, "batch": 4, "checkpointing": False},
    "LoRA, data, batch 4": {"lmbda": 0.0, "batch": 4, "checkpointing": False},
    "LoRA, data, batch 8": {"lmbda": 0.0, "batch": 8, "checkpointing": False},
    "LoRA, data, batch 8, checkpointing": {"lmbda": 0.0, "batch": 8, "checkpointing": True},
    "all weights, data, batch 4": {"lmbda": 0.0, "batch": 4, "checkpointing": False, "lora": False},
}
TOKENS = 256


def recipe_flags(model: str, case: dict[str, Any], folder: str) -> tuple[str, list[str]]:
    """A recipe file and its flags: rows of exactly TOKENS tokens."""
    text = f"""
from datasets import Dataset
from gkd.demo import {model}_student as student, {model}_teacher as teacher
from gkd.run import run

def load_data(settings):
    row = {{"input_ids": [5] * {TOKENS}, "labels": [-100] * 32 + [5] * {TOKENS - 32}}}
    return {{"train": Dataset.from_list([row] * 32)}}

run(load_data, defaults={{"model_name_or_path": student, "teacher_model_name_or_path": teacher}})
"""
    path = Path(folder) / "recipe.py"
    path.write_text(text)
    flags = {
        "output_dir": folder,
        "lmbda": case["lmbda"],
        "per_device_train_batch_size": case["batch"],
        "gradient_checkpointing": str(case["checkpointing"]).lower(),
        "max_steps": 2,
        "max_length": TOKENS,
        "max_new_tokens": TOKENS - 64,
        "evaluate_before_and_after": "false",
        "save_strategy": "no",
        "report_to": "none",
    }
    if case.get("lora", True):
        flags |= {"use_peft": "true", "lora_r": 16, "lora_target_modules": "all-linear"}
    return str(path), [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def one(model: str, name: str) -> dict[str, int]:
    """Run one case in this process: its plan, then its peak."""
    import torch

    from gkd.memory import estimate
    from gkd.plan import setup_of
    from gkd.recipe import capture, execute_recipe

    with tempfile.TemporaryDirectory() as folder:
        path, flags = recipe_flags(model, CASES[name], folder)
        planned = estimate(setup_of(capture(path, flags), 1, 0, False)).peak
        execute_recipe(path, flags)
    if torch.cuda.is_available():
        return {"planned": planned, "measured": torch.cuda.max_memory_allocated()}
    return {"planned": planned, "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "glass"), default="smollm2")
    parser.add_argument("--one", help="run this case in this process (used by the script itself)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.model, args.one)))
        return
    results = {}
    for name in CASES:
        command = [sys.executable, __file__, "--model", args.model, "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        planned, measured = (results[name][key] / 2**30 for key in ("planned", "measured"))
        print(f"{name:38s} planned {planned:6.2f} GiB  measured {measured:6.2f} GiB  {planned / measured - 1:+.0%}")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = ROOT / "benchmarks" / "results" / f"memory_{device}_{args.model}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"tokens": TOKENS, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
