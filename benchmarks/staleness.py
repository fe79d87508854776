"""What a rollout for several steps costs in quality: forward and reverse KL, trained on-policy and in groups.

    python benchmarks/staleness.py             # the glass pair, some five minutes of one core
    python benchmarks/staleness.py --seeds 1   # sooner, with no error of the mean

The student of recipes/gkd_glass.py with its LoRA, prompts and learning rate writes all that it is trained on
(`lmbda=1`), at temperature 1, for an equal number of steps with every `rollout_every`. The measure is what it was
trained on, at the end: the same divergence to the teacher, in nats per token, over what the student then writes behind
held-out prompts with fixed random numbers. Differences to `rollout_every=1` are by seed.

Results are written to benchmarks/results/staleness_cpu_glass.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import runpy
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.config.fields import GKDConfig
from gkd.training.trainer import GKDTrainer

ROOT = Path(__file__).resolve().parent.parent
BETAS = {"forward KL": 0.0, "reverse KL": 1.0}


class Task:
    """The recipe's models and rows."""

    def __init__(self, prompts: int) -> None:
        recipe = runpy.run_path(str(ROOT / "recipes" / "gkd_glass.py"))
        self.defaults = recipe["DEFAULTS"]
        data = recipe["load_data"](None)
        self.rows, self.held_out = list(data["train"]), list(data["eval"])[:prompts]
        self.student, self.teacher = (str(self.defaults[f"{name}model_name_or_path"]()) for name in ("", "teacher_"))
        self.tokenizer = AutoTokenizer.from_pretrained(self.student)

    def train(self, beta: float, every: int, seed: int, args: argparse.Namespace) -> tuple[float, float]:
        """The measure at the end, and CPU seconds of the training."""
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            names = ("learning_rate", "warmup_steps", "max_length")
            config = GKDConfig(
                output_dir=folder,
                lmbda=1.0,
                beta=beta,
                temperature=1.0,
                rollout_every=every,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch,
                max_new_tokens=args.tokens,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
                **{name: self.defaults[name] for name in names},
            )
            trainer = GKDTrainer(
                AutoModelForCausalLM.from_pretrained(self.student),
                AutoModelForCausalLM.from_pretrained(self.teacher),
                config,
                train_dataset=Dataset.from_list(self.rows),
                processing_class=self.tokenizer,
                peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            )
            start = time.process_time()
            trainer.train()
            seconds = time.process_time() - start
            return self.measure(trainer, beta), seconds

    @torch.no_grad()
    def measure(self, trainer: Any, beta: float) -> float:
        prompts = [self.tokenizer(row["prompt"])["input_ids"] for row in self.held_out]
        written = trainer.rollouts["student"].generate(prompts, step=1_000_000)
        student, teacher = trainer.model.eval(), trainer.teacher_model
        total, number = 0.0, 0
        for prompt, completion in zip(prompts, written, strict=True):
            ids = torch.tensor([[*prompt, *completion]])
            places = slice(len(prompt) - 1, ids.shape[1] - 1)
            q, p = (model(ids).logits[0, places].double().log_softmax(-1) for model in (student, teacher))
            terms = p.exp() * (p - q) if beta == 0 else q.exp() * (q - p)
            total, number = total + float(terms.sum()), number + len(completion)
        return total / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, results = Task(args.prompts), {}
    for name, beta in BETAS.items():
        runs = {every: [task.train(beta, every, seed, args) for seed in range(args.seeds)] for every in args.every}
        first = [value for value, _ in runs[args.every[0]]]
        for every, found in runs.items():
            values = [value for value, _ in found]
            gaps = [value - one for value, one in zip(values, first, strict=True)]
            row = {"nats": mean(values), "difference": mean(gaps), "seconds": mean(second for _, second in found)}
            if args.seeds > 1:
                row["error"] = stdev(gaps) / math.sqrt(args.seeds)
            results[f"{name}, rollout_every={every}"] = row
            print(f"{name}, rollout_every={every}: " + ", ".join(f"{key} {one:.4f}" for key, one in row.items()))
    about = {"machine": platform.machine(), "torch": torch.__version__, **vars(args)}
    path = ROOT / "benchmarks" / "results" / "staleness_cpu_glass.json"
    path.write_text(json.dumps({"settings": about, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
