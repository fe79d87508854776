"""What cached scores save: the same rows in two epochs, and again by a run that never loads the teacher.

    python benchmarks/scores.py                # SmolLM2 pair, and a larger teacher; about four minutes on two cores
    python benchmarks/scores.py --pair glass   # seconds: to see that the script works

Each training is a process of its own, so that its peak memory is its own. Pairs: "smollm2" (113M student, 135M
teacher, the demo's), "large" (the same student; a teacher in the shape of SmolLM2-360M with random weights, which cost
as much as trained ones), "glass" (the 0.85M pair). Rows are running text, LoRA r = 16, `lmbda=0`.

Results are merged, pair by pair, into benchmarks/results/scores_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from gkd.config.fields import GKDConfig
from gkd.demo.models import glass_student, glass_teacher, smollm2_student, smollm2_teacher
from gkd.demo.texts import openwebtext_excerpts
from gkd.training.trainer import GKDTrainer

RESULTS = Path(__file__).resolve().parent / "results"
PAIRS = ("smollm2", "large", "glass")
LARGE = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15}
LARGE |= {"num_key_value_heads": 5}


def models(pair: str, folder: Path) -> tuple[str, str]:
    """Names of student and teacher; a random teacher is made in `folder`."""
    if pair == "glass":
        return str(glass_student()), str(glass_teacher())
    if pair == "smollm2":
        return str(smollm2_student()), str(smollm2_teacher())
    path = folder / "large"
    if not path.exists():
        config = AutoConfig.from_pretrained(smollm2_teacher(), **LARGE)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        AutoTokenizer.from_pretrained(smollm2_teacher()).save_pretrained(path)
    return str(smollm2_student()), str(path)


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())


def train(args: argparse.Namespace) -> None:
    """One training in this process; prints its figures as the last line."""
    student, teacher = models(args.pair, args.folder)
    tokenizer = AutoTokenizer.from_pretrained(student)
    texts = [" ".join(text.split()) for text in openwebtext_excerpts()]
    rows = [text for text in texts if len(tokenizer(text)["input_ids"]) > args.tokens][: args.rows * args.steps]
    assert len(rows) == args.rows * args.steps, len(rows)
    times = StepTimes()
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        args=GKDConfig(
            str(args.folder / "out"),
            teacher_model_name_or_path=teacher,
            teacher_model_init_kwargs={"dtype": "float32"},
            teacher_scores_dir=str(args.folder / f"scores-{args.pair}") if args.train != "live" else None,
            lmbda=0.0,
            max_length=args.tokens,
            per_device_train_batch_size=args.rows,
            num_train_epochs=args.epochs,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        callbacks=[times],
    )
    trainer.train()
    seconds = [after - before for before, after in zip(times.marks, times.marks[1:], strict=False)]
    of_teacher = [line["time/teacher"] for line in trainer.state.log_history if "time/teacher" in line]
    cached: Any = trainer.teacher
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    epochs = range(0, len(seconds), args.steps)
    figures = {
        "seconds_per_step": [round(_median(seconds[at : at + args.steps]), 3) for at in epochs],
        "seconds_of_the_teacher": [round(_median(of_teacher[at : at + args.steps]), 4) for at in epochs],
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else peak, 2),
        "loaded": getattr(cached, "loaded", True),
    }
    if args.train != "live":
        store = cached.store
        size = sum(path.stat().st_size for path in store.path.glob("rows-*"))
        figures["bytes_per_target"] = round(size / (len(rows) * (args.tokens - 1)), 1)
        figures["head_mb"] = round((store.path / "head.safetensors").stat().st_size / 1e6, 1)
    print(json.dumps(figures))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, nargs="*", default=["smollm2", "large"])
    parser.add_argument("--rows", type=int, default=4, help="of an optimizer step")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--steps", type=int, default=5, help="of an epoch")
    parser.add_argument("--train", choices=("live", "fill", "lean"), help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        args.pair = args.pair[0]
        train(args)
        return
    path = RESULTS / f"scores_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for pair in args.pair:
            result = {"rows": args.rows, "tokens": args.tokens, "steps": args.steps, "torch": torch.__version__}
            for kind, epochs in (("live", 1), ("fill", 2), ("lean", 1)):
                command = [sys.executable, __file__, "--pair", pair, "--train", kind, "--epochs", str(epochs)]
                command += ["--folder", folder, "--rows", str(args.rows), "--tokens", str(args.tokens)]
                output = subprocess.run([*command, "--steps", str(args.steps)], check=True, stdout=subprocess.PIPE)
                result[kind] = json.loads(output.stdout.splitlines()[-1])
                print(pair, kind, result[kind], flush=True)
            results[pair] = result
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
