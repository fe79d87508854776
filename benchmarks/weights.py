"""What the fields of docs/weights.md cost: CPU seconds of a step with each, as a multiple of the plain one's.

    python benchmarks/weights.py                  # SmolLM2-135M pair, a quarter of an hour of CPU time
    python benchmarks/weights.py --model glass    # the 0.85M pair, a minute

Steps on data and the student's own text, half of each, LoRA. Ways take turns; the table has the median over the rounds
of each way's fastest step in a round, divided by the plain one's of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from step import PAIRS
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from gkd.config.fields import GKDConfig
from gkd.demo.texts import healthsearchqa_prompts, openwebtext_excerpts
from gkd.training.trainer import GKDTrainer

RESULTS = Path(__file__).resolve().parent / "results"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "divergence_student": {"divergence_student": "reverse_kl"},
    "token_weights=iw_opd": {"token_weights": "iw_opd"},
    "token_weights=disagreement": {"token_weights": "disagreement"},
    "log_top_k_overlap=16": {"log_top_k_overlap": 16},
    "reward_weight": {"reward_weight": 0.2},
}


class CPUSeconds(TrainerCallback):
    """Of each step, the rollout included."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.process_time())

    @property
    def fastest(self) -> float:
        """The first step warms up."""
        return min(b - a for a, b in zip(self.marks[1:], self.marks[2:], strict=False))


def seconds(pair: tuple[str, str], rows: Dataset, tokens: int, way: dict[str, Any]) -> float:
    """CPU seconds of the fastest of three steps."""
    tokenizer, clock = AutoTokenizer.from_pretrained(pair[0]), CPUSeconds()
    if tokenizer.chat_template is None:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    student, teacher = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in pair)
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            folder,
            **{
                "lmbda": 0.5,
                "temperature": 1.0,
                "max_new_tokens": tokens,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 4,
                "gradient_checkpointing": False,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                **way,
            },
        )
        trainer = GKDTrainer(
            student,
            teacher,
            args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            reward=(lambda completion, row: float(len(completion))) if "reward_weight" in way else None,
            callbacks=[clock],
        )
        trainer.train()
    return clock.fastest


def main() -> None:
    """Take turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PAIRS, default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    student, teacher = PAIRS[args.model]
    pair = (str(student()), str(teacher()))
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": t[:300]}]}
        for q, t in zip(healthsearchqa_prompts()[:64], openwebtext_excerpts()[:64], strict=True)
    ]
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(args.rounds):
        once = {name: seconds(pair, Dataset.from_list(chats), args.tokens, way) for name, way in WAYS.items()}
        for name, value in once.items():
            found[name].append(value / once["plain"])
        print({name: round(value, 3) for name, value in once.items()}, flush=True)
    table = {name: round(statistics.median(ratios), 3) for name, ratios in found.items()}
    record = {"model": args.model, "torch": torch.__version__, "rounds": args.rounds, "ratios": table, "all": found}
    path = RESULTS / f"weights_cpu_{args.model}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(f"{name:32s} {ratio:.3f}" for name, ratio in table.items()))


if __name__ == "__main__":
    main()
