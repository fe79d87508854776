"""Whole optimizer steps: this package, TRL's GKDTrainer and DistillationTrainer, and the same work done by hand.

    python benchmarks/step.py                       # SmolLM2-135M pair, about 40 minutes on a quiet 2-core machine
    python benchmarks/step.py --model glass         # the 0.85M pair, a minute: to see that the script works
    python benchmarks/step.py --cases "on-policy, checkpointing"

Every contender sees the same prompts and generates exactly the same number of tokens in every row (no stop tokens), so
that lengths do not decide. Contenders take turns within a round, so a busy machine slows all of them; the table shows
the best step of all rounds, in seconds and as a multiple of ours. "by hand" is the limit: one bare `generate` for the
whole step, one bare teacher forward and one bare student forward and backward per micro-batch. "other tokenizer" is
this package with a teacher whose tokenizer lacks a third of the student's merges and numbers its tokens otherwise,
compared by bytes (`teacher_tokenizer_alignment`): same models, same texts, 4 % more tokens for the teacher.
"rollout_every=4" is this package with one rollout for four steps; on a CPU it pays where a step has few rows (`--batch
2 --accumulation 1`), since 16 rows are decoded at a time anyway. `--clock cpu` counts what this process has computed,
for a machine that others use, too: not on a GPU.

Results are merged into benchmarks/results/step_<device>_<model>.json, case by case; contenders that are left
out (`--contenders`) keep their figures there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig as TRLGKDConfig
from trl.experimental.gkd import GKDTrainer as TRLGKDTrainer

from gkd.config.fields import GKDConfig
from gkd.demo.models import glass_student, glass_teacher, smollm2_student, smollm2_teacher
from gkd.demo.texts import healthsearchqa_prompts, openwebtext_excerpts
from gkd.training.trainer import GKDTrainer

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # name: (lmbda, gradient checkpointing)
    "on-policy, checkpointing": (1.0, True),
    "on-policy": (1.0, False),
    "half, checkpointing": (0.5, True),
    "half": (0.5, False),
    "data only, checkpointing": (0.0, True),
    "data only": (0.0, False),
}
EVERY = 4  # steps of a group
SIZES = ("batch", "accumulation", "tokens", "clock")
PAIRS = {"smollm2": (smollm2_student, smollm2_teacher), "glass": (glass_student, glass_teacher)}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = CLOCKS["wall"]


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next, so that what precedes `on_step_begin` counts."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(_clock())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(_clock())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


class Pair:
    """Models, tokenizer and rows that all contenders share by name."""

    def __init__(self, args: argparse.Namespace) -> None:
        student, teacher = PAIRS[args.model]
        self.student, self.teacher, self.tokens = str(student()), str(teacher()), args.tokens
        self.tokenizer = AutoTokenizer.from_pretrained(self.student)
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        self.batch, self.accumulation = args.batch, args.accumulation
        texts = [self._exactly(text, args.tokens) for text in openwebtext_excerpts()[:64]]
        questions = healthsearchqa_prompts()[:64]
        self.rows = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": t}]}
            for q, t in zip(questions, texts, strict=True)
        ]

    def _exactly(self, text: str, tokens: int) -> str:
        return str(self.tokenizer.decode(self.tokenizer(text)["input_ids"][: tokens - 1]))

    def common(self, folder: str, steps: int, checkpointing: bool) -> dict[str, Any]:
        cpu = not torch.cuda.is_available()
        return {
            "output_dir": folder,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": steps,
            "gradient_checkpointing": checkpointing,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": cpu,
            "bf16": not cpu,
            "temperature": 1.0,
            "seed": 0,
        }

    def lora(self) -> LoraConfig:
        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    def load(self, name: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")


def run_trainer(
    trainer_class: Any, config: Any, pair: Pair, rows: list[Any], force: Any, **beside: Any
) -> tuple[Any, list[float]]:
    """Train with one of the three trainers; `force(trainer)` makes it write the full number of tokens."""
    timer = StepTimes()
    trainer = trainer_class(
        pair.load(pair.student),
        pair.load(pair.teacher),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=pair.tokenizer,
        peft_config=pair.lora(),
        callbacks=[timer],
        **beside,
    )
    force(trainer)
    trainer.train()
    return trainer, timer.seconds


def ours(
    pair: Pair, lmbda: float, checkpointing: bool, steps: int, aligned: bool = False, every: int = 1
) -> tuple[list[float], dict[str, float]]:
    """Seconds per step, and where they went (`time/...` of the last step)."""

    def nothing_stops(trainer: Any) -> None:
        for rollout in trainer.rollouts.values():
            object.__setattr__(rollout.settings, "stop_ids", ())

    with tempfile.TemporaryDirectory() as folder:
        values = pair.common(folder, steps, checkpointing)
        values |= {"teacher_tokenizer_alignment": "bytes"} if aligned else {}
        values |= {"rollout_every": every}
        config = GKDConfig(lmbda=lmbda, max_new_tokens=pair.tokens, **values)
        beside = {"teacher_processing_class": without_some_merges(pair.tokenizer)} if aligned else {}
        trainer, seconds = run_trainer(GKDTrainer, config, pair, pair.rows, nothing_stops, **beside)
        logs = [entry for entry in trainer.state.log_history if "time/rollout" in entry and "loss" in entry][-every:]
        parts = {name: sum(entry.get(name, 0.0) for entry in logs) / every for name in logs[-1] if "time/" in name}
    names = ("rollout", "teacher", "student", *(("alignment",) if aligned else ()))
    return seconds, {name: parts[f"time/{name}"] for name in names}


def grouped(pair: Pair, lmbda: float, checkpointing: bool, steps: int) -> tuple[list[float], dict[str, float]]:
    """Seconds a step, as means of groups: the first step of each writes for all."""
    seconds, parts = ours(pair, lmbda, checkpointing, EVERY * steps, every=EVERY)
    return [sum(seconds[i : i + EVERY]) / EVERY for i in range(0, len(seconds), EVERY)], parts


def other_tokenizer(pair: Pair, lmbda: float, checkpointing: bool, steps: int) -> tuple[list[float], dict[str, float]]:
    return ours(pair, lmbda, checkpointing, steps, aligned=True)


def without_some_merges(tokenizer: Any) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer without the last third of its merges and what they make, its ids dealt anew."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = state["model"]["merges"]
    kept, lost = merges[: 2 * len(merges) // 3], merges[2 * len(merges) // 3 :]
    gone = {"".join(pair) for pair in lost} - {"".join(pair) for pair in kept}
    tokens = [token for token in state["model"]["vocab"] if token not in gone]
    random.Random(0).shuffle(tokens)
    ids = {token: i for i, token in enumerate(tokens)}
    state["model"] |= {"merges": kept, "vocab": ids}
    for token in state["added_tokens"]:
        token["id"] = ids[token["content"]]
    backend = Tokenizer.from_str(json.dumps(state))
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    other = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    other.chat_template = tokenizer.chat_template
    return other


def trl_gkd(pair: Pair, lmbda: float, checkpointing: bool, steps: int) -> tuple[list[float], dict[str, float]]:
    def nothing_stops(trainer: Any) -> None:
        trainer.generation_config.min_new_tokens = pair.tokens

    with tempfile.TemporaryDirectory() as folder:
        config = TRLGKDConfig(lmbda=lmbda, max_new_tokens=pair.tokens, **pair.common(folder, steps, checkpointing))
        return run_trainer(TRLGKDTrainer, config, pair, pair.rows, nothing_stops)[1], {}


def trl_distillation(
    pair: Pair, lmbda: float, checkpointing: bool, steps: int
) -> tuple[list[float], dict[str, float]]:
    prompts = [{"prompt": row["messages"][:1]} for row in pair.rows]
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            beta=0.5,
            max_completion_length=pair.tokens,
            generation_kwargs={"min_new_tokens": pair.tokens},
            **pair.common(folder, steps, checkpointing),
        )
        return run_trainer(DistillationTrainer, config, pair, prompts, lambda trainer: None)[1], {}


def by_hand(pair: Pair, lmbda: float, checkpointing: bool, steps: int) -> tuple[list[float], dict[str, float]]:
    """The limit: the bare model calls of a step, without any loss beyond the model's own cross-entropy."""
    student = get_peft_model(pair.load(pair.student), pair.lora())
    teacher = pair.load(pair.teacher).eval()
    student.train()  # in eval mode there is no gradient checkpointing
    if checkpointing:
        student.enable_input_require_grads()
        student.gradient_checkpointing_enable()
    number = pair.batch * pair.accumulation
    written = round(lmbda * number)
    prompts = [pair.tokenizer.apply_chat_template(row["messages"][:1], tokenize=False) for row in pair.rows[:number]]
    full = [pair.tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in pair.rows[:number]]
    pair.tokenizer.padding_side = "left"
    settings = GenerationConfig(
        max_new_tokens=pair.tokens,
        min_new_tokens=pair.tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=pair.tokenizer.pad_token_id,
    )
    seconds = []
    for _ in range(steps):
        start = _clock()
        texts = full[written:]
        if written:
            student.eval()
            batch = pair.tokenizer(prompts[:written], return_tensors="pt", padding=True).to(student.device)
            with torch.no_grad():
                texts = texts + pair.tokenizer.batch_decode(student.generate(**batch, generation_config=settings))
            student.train()
        for i in range(0, number, pair.batch):
            batch = pair.tokenizer(texts[i : i + pair.batch], return_tensors="pt", padding=True).to(student.device)
            with torch.no_grad():
                teacher(**batch, use_cache=False)
            student(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        student.zero_grad()
        seconds.append(_clock() - start)
    return seconds, {}


Contender = Callable[[Pair, float, bool, int], tuple[list[float], dict[str, float]]]
CONTENDERS: dict[str, Contender] = {
    "gkd": ours,
    "rollout_every=4": grouped,
    "other tokenizer": other_tokenizer,
    "TRL GKDTrainer": trl_gkd,
    "TRL DistillationTrainer": trl_distillation,
    "by hand": by_hand,
}


def measure(pair: Pair, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Best seconds per step of each contender; the first step of every run warms up and is left out."""
    lmbda, checkpointing = CASES[case]
    seconds: dict[str, list[float]] = {}
    parts: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for name in args.contenders:
            if name == "TRL DistillationTrainer" and lmbda < 1:
                continue  # it is always on-policy
            torch.manual_seed(0)
            found, where = CONTENDERS[name](pair, lmbda, checkpointing, args.steps + 1)
            seconds.setdefault(name, []).extend(found[1:])
            parts |= {name: where} if where else {}
    best = {name: min(values) for name, values in seconds.items()}
    found: dict[str, Any] = {"seconds": best, "parts": parts.get("gkd", {})}
    found |= {"parts_grouped": parts["rollout_every=4"]} if "rollout_every=4" in parts else {}
    return found | ({"parts_aligned": parts["other tokenizer"]} if "other tokenizer" in parts else {})


def table(results: dict[str, Any]) -> str:
    lines = [f"{'case':38s}" + "".join(f"{name:>26s}" for name in CONTENDERS) + "   rollout/teacher/student"]
    for case, result in results.items():
        own = result["seconds"]["gkd"]
        cells = [
            f"{result['seconds'][name]:14.2f} s {result['seconds'][name] / own:8.2f}x"
            if name in result["seconds"]
            else f"{'-':>26s}"
            for name in CONTENDERS
        ]
        where = " / ".join(f"{value:.1f}" for value in result["parts"].values())
        lines.append(f"{case:38s}" + "".join(f"{cell:>26s}" for cell in cells) + f"   {where}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PAIRS, default="smollm2")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens in every row")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each contender in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, where others work, too")
    args = parser.parse_args()
    global _clock
    _clock = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    pair = Pair(args)
    path = ROOT / "benchmarks" / "results" / f"step_{'cuda' if torch.cuda.is_available() else 'cpu'}_{args.model}.json"
    results: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    changed = [f"{name} {vars(args)[name]}" for name in SIZES if vars(args)[name] != parser.get_default(name)]
    for case in args.cases:
        name = ", ".join([case, *changed])
        found = measure(pair, case, args)
        before = results.get(name, {})
        found["seconds"] = {**before.get("seconds", {}), **found["seconds"]}
        results[name] = {**before, **found, "load": round(os.getloadavg()[0], 1)}
        print(table({name: results[name]}), flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    record = {"device": device, "torch": torch.__version__, "arguments": vars(args), "results": results}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print("\n" + table(results) + f"\n\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
