"""Time to quality: CPU seconds of training until the held-out divergence on the student's own completions is down to
three fixed levels. This package, TRL's DistillationTrainer and TRL's GKDTrainer, each at its best of three learning
rates.

    python benchmarks/time_to_quality.py                  # the glass pair, a quarter of an hour of one core
    python benchmarks/time_to_quality.py --pair smollm2   # SmolLM2-135M and 24 of its 30 layers, an hour and more
    python benchmarks/time_to_quality.py --seeds 1        # sooner, with no error of the mean

All train the student of the pair's recipe with its LoRA and its prompts, in one thread of one process, in turns.
What is counted is the process's CPU time from the first step on; evaluations are off the clock. The measure: the
generalized JSD (beta 0.5) to the teacher, in nats per token, over what the student writes at temperature 1 behind
held-out prompts, up to the end that the model's generation config has, or the longest completion. The levels are
shares of where the student starts. The learning rate is chosen on a seed of its own, by the time to the lowest level
that was reached, and the figures are means over other seeds.

| contender | what it trains on |
| --- | --- |
| gkd | half its own completions, half the teacher's, as the recipe says |
| gkd, own only | its own completions |
| gkd, own, short first | its own completions, of at most 8 tokens at first and all at last: a schedule |
| gkd, own, short first, ahead | the same, written for four steps at once (`rollout_every=4`) |
| TRL DistillationTrainer | its own completions; it knows nothing else |
| TRL GKDTrainer | as gkd: `lmbda=0.5, seq_kd=True` |

Unsloth's patched GKDTrainer is left out: unsloth 2026.10.9 does not import without an accelerator
(unsloth/device_type.py:124).

Each run's curve is written to benchmarks/results/time_to_quality_cpu_PAIR.json when it is there; started again, the
script goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from conformance.definition import jsd
from datasets import Dataset
from peft import LoraConfig
from time_levels import LEVELS, TUNING, best_rate, found_in, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig as TRLGKDConfig
from trl.experimental.gkd import GKDTrainer as TRLGKDTrainer

from gkd.commands.sweep.outcome import commit
from gkd.config.fields import GKDConfig
from gkd.training.trainer import GKDTrainer

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Pair:
    """What differs between the pairs; None takes the recipe's."""

    recipe: str
    held_out: str  # the recipe's set that the prompts come from
    rates: tuple[float, ...]  # learning rates to choose from
    steps: int  # most of a run
    every: int  # steps between evaluations
    prompts: int  # held out
    batch: int | None = None  # sequences of a step
    new_tokens: int | None = None
    lengths: int | None = None  # of the held-out prompts: the commonest so many alone, which are few batches


PAIRS = {
    "glass": Pair("gkd_glass", "eval", (5e-3, 1e-2, 2e-2), steps=60, every=5, prompts=64),
    "smollm2": Pair(
        "gkd_smollm2", "prompts", (1e-3, 2e-3), steps=18, every=3, prompts=16, batch=8, new_tokens=32, lengths=2
    ),
}
NO_ANSWER = "I do not know of any short answer to this question that I would be sure of."  # of rows that have none


class Task:
    """The recipe's models and rows, and the measure."""

    def __init__(self, pair: Pair, prompts: int) -> None:
        recipe = runpy.run_path(str(ROOT / "recipes" / f"{pair.recipe}.py"))
        own = {"max_new_tokens": pair.new_tokens, "per_device_train_batch_size": pair.batch}
        self.defaults = recipe["DEFAULTS"] | {name: value for name, value in own.items() if value is not None}
        data = recipe["load_data"](None)
        self.rows = list(data["train"])
        self.student, self.teacher = (str(self.defaults[f"{name}model_name_or_path"]()) for name in ("", "teacher_"))
        self.tokenizer = AutoTokenizer.from_pretrained(self.student)
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = TEMPLATE
        held_out = [self._ids(row["prompt"]) for row in data[pair.held_out]]
        common = dict(Counter(map(len, held_out)).most_common(pair.lengths))
        self.held_out = [prompt for prompt in held_out if len(prompt) in common][:prompts]
        self.judge = self.load(self.teacher).eval()
        ends = self.judge.generation_config.eos_token_id  # of glass the ends of sentences, too
        self.stops = torch.tensor([ends] if isinstance(ends, int) else ends)

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        return list(
            self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    def chats(self) -> list[dict[str, Any]]:
        """The rows as TRL's GKDTrainer wants them: it must be given answers, which it does not read here."""
        found = []
        for row in self.rows:
            asked, answer = row["prompt"], row.get("completion", NO_ANSWER)
            turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            found.append({"messages": [*turns, {"role": "assistant", "content": answer}]})
        return found

    def load(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    @torch.no_grad()
    def divergence(self, student: Any) -> float:
        """Nats per token on what the student writes behind the held-out prompts."""
        was_training, total, number = student.training, 0.0, 0
        student.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            for length in sorted({len(prompt) for prompt in self.held_out}):
                batch = torch.tensor([prompt for prompt in self.held_out if len(prompt) == length])
                value, count = self._of_one_length(student, batch, length)
                total, number = total + value, number + count
        student.train(was_training)
        return total / number

    def _of_one_length(self, student: Any, batch: Any, length: int) -> tuple[float, int]:
        ids = batch
        cache, last = None, batch
        for _ in range(self.defaults["max_new_tokens"]):
            output = student(input_ids=last, past_key_values=cache, use_cache=True)
            cache, last = output.past_key_values, output.logits[:, -1].softmax(-1).multinomial(1)
            ids = torch.cat([ids, last], dim=1)
        written = ids[:, length:]
        ends = torch.isin(written, self.stops)
        keep = ends.cumsum(1) - ends.long() == 0  # up to and with the first end
        logits = [model(input_ids=ids).logits[:, length - 1 : -1][keep] for model in (student, self.judge)]
        return float(jsd(logits[0].log_softmax(-1), logits[1].log_softmax(-1), 0.5).sum()), int(keep.sum())

    def settings(self, folder: str, steps: int, rate: float, seed: int) -> dict[str, Any]:
        """What all three trainers take by the same names."""
        names = ("beta", "temperature", "warmup_steps", "per_device_train_batch_size", "gradient_checkpointing")
        return {name: self.defaults[name] for name in names} | {
            "output_dir": folder,
            "max_steps": steps,
            "learning_rate": rate,
            "seed": seed,
            "lr_scheduler_type": "constant_with_warmup",
            "logging_steps": 1000,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
        }

    def lora(self) -> LoraConfig:
        return LoraConfig(
            r=self.defaults["lora_r"],
            lora_alpha=self.defaults["lora_alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )


class Clock(TrainerCallback):
    """CPU seconds of training and the divergence, every few steps; stops at the lowest level."""

    def __init__(self, task: Task, every: int, lowest: float) -> None:
        self.task, self.every, self.lowest = task, every, lowest
        self.off = 0.0
        self.curve: list[tuple[int, float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        now = time.process_time()
        value = self.task.divergence(model)
        self.curve.append((state.global_step, now - self.start - self.off, value))
        self.off += time.process_time() - now
        control.should_training_stop = control.should_training_stop or value <= self.lowest


Make = Callable[[Task, dict[str, Any]], tuple[Any, Any, list[dict[str, Any]]]]


def _gkd(share: float, shortest: int | None = None, **further: Any) -> Make:
    def make(task: Task, values: dict[str, Any]) -> tuple[Any, Any, list[dict[str, Any]]]:
        own = {name: task.defaults[name] for name in ("max_new_tokens", "max_length")}
        if shortest is not None:
            own["max_new_tokens"] = f"{shortest}@0% {own['max_new_tokens']}@100%"
        return GKDTrainer, GKDConfig(lmbda=share, seq_kd=share < 1, **own, **values, **further), task.rows

    return make


def _trl_gkd(task: Task, values: dict[str, Any]) -> tuple[Any, Any, list[dict[str, Any]]]:
    own = {name: task.defaults[name] for name in ("max_new_tokens", "max_length")}
    return TRLGKDTrainer, TRLGKDConfig(lmbda=0.5, seq_kd=True, **own, **values), task.chats()


def _trl_distillation(task: Task, values: dict[str, Any]) -> tuple[Any, Any, list[dict[str, Any]]]:
    config = DistillationConfig(max_completion_length=task.defaults["max_new_tokens"], **values)
    return DistillationTrainer, config, [{"prompt": row["prompt"]} for row in task.rows]


CONTENDERS: dict[str, Make] = {
    "gkd": _gkd(0.5),
    "gkd, own only": _gkd(1.0),
    "gkd, own, short first": _gkd(1.0, shortest=8),
    "gkd, own, short first, ahead": _gkd(1.0, shortest=8, rollout_every=4),
    "TRL DistillationTrainer": _trl_distillation,
    "TRL GKDTrainer": _trl_gkd,
}


def train(task: Task, name: str, rate: float, seed: int, args: argparse.Namespace, lowest: float) -> list[Any]:
    """The curve of one run: (step, CPU seconds, divergence)."""
    with tempfile.TemporaryDirectory() as folder:
        trainer_class, config, rows = CONTENDERS[name](task, task.settings(folder, args.steps, rate, seed))
        torch.manual_seed(seed)
        clock = Clock(task, args.every, lowest)
        trainer_class(
            task.load(task.student),
            task.load(task.teacher),
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=task.tokenizer,
            peft_config=task.lora(),
            callbacks=[clock],
        ).train()
    step, seconds, value = clock.curve[-1]
    print(f"{name:28s} rate {rate:<7g} seed {seed}: {value:.4f} after {step} steps, {seconds:.1f} s", flush=True)
    return clock.curve


class Results:
    """What has been run so far, on disk after every run: a start with the same settings goes on."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        found = json.loads(path.read_text()) if path.exists() else {}
        same = all(found.get(name) == value for name, value in about.items())
        self.runs: list[dict[str, Any]] = found["runs"] if same and found else []

    def curve(self, name: str, rate: float, seed: int, make: Callable[[], list[Any]]) -> list[Any]:
        """The curve of a run, which is made if it is not there."""
        key = {"contender": name, "rate": rate, "seed": seed}
        for run in self.runs:
            if all(run[part] == value for part, value in key.items()):
                return run["curve"]
        self.runs.append({**key, "commit": commit(ROOT), "curve": make()})
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        self.path.write_text(json.dumps(self.about, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]\n}}\n')
        return self.runs[-1]["curve"]


def table(kept: dict[str, Any]) -> str:
    """As docs/evidence.md has it, for a terminal."""
    heads = ["contender", "rate", *(f"{share:.0%} of start" for share in LEVELS)]
    lines = [heads, *rows(kept["levels"], found_in(kept))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="glass")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to choose from")
    parser.add_argument("--steps", type=int, help="most steps of a run")
    parser.add_argument("--every", type=int, help="steps between evaluations")
    parser.add_argument("--prompts", type=int, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the figures, beside the one for the rate")
    parser.add_argument("--output", type=Path, help="benchmarks/results/time_to_quality_cpu_PAIR.json without it")
    args = parser.parse_args()
    pair = PAIRS[args.pair]
    for name in ("rates", "steps", "every", "prompts"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(pair, name))
    output = args.output or ROOT / f"benchmarks/results/time_to_quality_cpu_{args.pair}.json"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = Task(pair, args.prompts)
    start = task.divergence(task.load(task.student))
    levels = [share * start for share in LEVELS]
    print(f"before training {start:.4f} nats per token; levels {', '.join(f'{level:.4f}' for level in levels)}")
    about = {"start": start, "levels": levels, "steps": args.steps, "every": args.every, "prompts": args.prompts}
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    results = Results(output, {**about, **machine})

    def curve(name: str, rate: float, seed: int) -> list[Any]:
        return results.curve(name, rate, seed, lambda: train(task, name, rate, seed, args, levels[-1]))

    tuned: dict[str, dict[float, list[Any]]] = {name: {} for name in args.contenders}
    for rate in args.rates if len(args.rates) > 1 else ():  # in turns; of one there is none to choose
        for name in args.contenders:
            tuned[name][rate] = curve(name, rate, TUNING)
    rates = {name: best_rate(curves, levels) if curves else args.rates[0] for name, curves in tuned.items()}
    for seed in range(TUNING + 1, args.seeds + 1):
        for name in args.contenders:
            curve(name, rates[name], seed)
    print(table({"levels": levels, "runs": results.runs}))


if __name__ == "__main__":
    main()
