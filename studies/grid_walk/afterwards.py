"""A sweep's students once more: after forced moves, and many samples of each.

    python studies/grid_walk/afterwards.py outputs/grid_walk studies/grid_walk/results/afterwards.json

After k = 0, 2, 4, 8 random moves, which stand behind the prompt and are the same for every student: how many answers
arrive, how many leave the board, on all test tasks. And of 16 samples at T = 1 of each of 64 tasks: how many different
walks arrive (as a share of the 16), and of how many tasks one does. `before` is the seed's student before the
training, `teacher` the teacher.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from models import ALPHABET, MODELS
from walk import arrives, leaves_the_board, random_moves, split_tasks

FORCED = (0, 2, 4, 8)
TASKS, SAMPLES = 64, 16


def prompts_after(count: int) -> list[str]:
    """Of all test tasks."""
    draw = random.Random(f"forced {count}")
    return [task.prompt + random_moves(draw, task.start, count) for task in split_tasks()[1]]


def measured(folder: Path) -> dict[str, float]:
    """Shares, by number of forced moves and way of writing."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for count in FORCED:
        prompts = prompts_after(count)
        for way in ("greedy", "sampled"):
            written = ALPHABET.answers(model, prompts, greedy=way == "greedy")
            pairs = list(zip(prompts, written, strict=True))
            found[f"arrives_{count}_{way}"] = sum(arrives(*pair) for pair in pairs) / len(pairs)
            found[f"leaves_{count}_{way}"] = sum(leaves_the_board(*pair) for pair in pairs) / len(pairs)
    prompts = [prompt for prompt in prompts_after(0)[:TASKS] for _ in range(SAMPLES)]
    written = ALPHABET.answers(model, prompts, greedy=False)
    right = {pair for pair in zip(prompts, written, strict=True) if arrives(*pair)}
    found["different_walks"] = len(right) / len(prompts)
    found["one_of_16"] = len({prompt for prompt, _ in right}) / TASKS
    return {name: round(value, 5) for name, value in found.items()}


def main() -> None:
    """Measure every run of the sweep."""
    torch.set_num_threads(1)
    sweep, path = map(Path, sys.argv[1:])
    swept = json.loads((sweep / "results.json").read_text(encoding="utf-8"))
    teacher = measured(MODELS / "teacher")
    before = {seed: measured(MODELS / f"student-{seed}") for seed in swept["seeds"]}
    runs = []
    for run in swept["runs"]:
        if run["tuning"]:
            continue
        words = run["command"].split()
        after, seed = measured(Path(words[words.index("--output_dir") + 1])), run["seed"]
        measures = {
            name: {"before": before[seed][name], "after": after[name], "teacher": teacher[name]} for name in after
        }
        runs.append({"cell": run["cell"], "seed": seed, "measures": measures})
        print(run["cell"], seed, after, flush=True)
    names = ("seeds", "cells", "failed")
    about = {"command": " ".join(["python", "studies/grid_walk/afterwards.py", *sys.argv[1:]])}
    about |= {name: swept[name] for name in names} | {"commit": swept["runs"][0]["commit"]}
    lines = ",\n".join(json.dumps(run) for run in runs)
    path.write_text(json.dumps(about, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
