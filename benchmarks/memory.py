"""The memory that `gkd plan` predicts beside the peak that a run reaches, each in a fresh process.

    python benchmarks/memory.py            # SmolLM2-135M pair, a few minutes
    python benchmarks/memory.py --model glass

On CUDA the peak is what torch allocated, without the context. On a CPU it is the process's resident set (ru_maxrss),
with glibc told to give freed buffers back to the system (MALLOC_MMAP_THRESHOLD_), so that the peak is what the run
holds, which is what the plan predicts. With --both it is measured once more as glibc does by default, where freed
buffers stay with the process. Results are written to benchmarks/results/memory_<device>_<model>.json.
"""

from __future__ import annotations

import argparse
import json
import os
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
    "LoRA without dropout, data, batch 4": {"lmbda": 0.0, "batch": 4, "checkpointing": False, "dropout": 0.0},
    "LoRA, data, batch 8, checkpointing": {"lmbda": 0.0, "batch": 8, "checkpointing": True},
    "all weights, data, batch 4": {"lmbda": 0.0, "batch": 4, "checkpointing": False, "lora": False},
}
TOKENS = 256
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


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
        flags |= {"lora_dropout": case.get("dropout", 0.05)}
    return str(path), [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def one(model: str, name: str) -> dict[str, int]:
    """Run one case in this process: its plan, then its peak."""
    import torch

    from gkd.commands.plan.memory import estimate
    from gkd.commands.plan.plan import setup_of
    from gkd.recipe.capture import capture, execute_recipe

    with tempfile.TemporaryDirectory() as folder:
        path, flags = recipe_flags(model, CASES[name], folder)
        planned = estimate(setup_of(capture(path, flags), 1, 0, False)).peak
        execute_recipe(path, flags)
    if torch.cuda.is_available():
        return {"planned": planned, "measured": torch.cuda.max_memory_allocated()}
    return {"planned": planned, "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def run_case(model: str, name: str, variables: dict[str, str]) -> dict[str, Any]:
    """Run one case in a fresh process."""
    command = [sys.executable, __file__, "--model", model, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables})
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "glass"), default="smollm2")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--both", action="store_true", help="on a CPU: with glibc's default settings, too")
    parser.add_argument("--one", help="run this case in this process (used by the script itself)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.model, args.one)))
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = ROOT / "benchmarks" / "results" / f"memory_{device}_{args.model}.json"
    path.parent.mkdir(exist_ok=True)
    for name in args.cases:
        result = run_case(args.model, name, GIVE_BACK if device == "cpu" else {})
        if device == "cpu" and args.both:
            result["measured_default_malloc"] = run_case(args.model, name, {})["measured"]
        result["error"] = round(result["planned"] / result["measured"] - 1, 3)
        sizes = "  ".join(f"{key} {size / 2**30:.2f} GiB" for key, size in result.items() if key != "error")
        print(f"{name:38s} {sizes}  error {result['error']:+.1%}", flush=True)
        results = json.loads(path.read_text())["results"] if path.exists() else {}  # other cases keep their figures
        results[name] = results.get(name, {}) | result
        path.write_text(json.dumps({"tokens": TOKENS, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
