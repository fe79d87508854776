"""Does it help to compare with a teacher of another tokenizer, rather than to train on its text alone?

    python studies/other_tokenizer/study.py --tune            # learning rates, on a seed that the table has not
    python studies/other_tokenizer/study.py                   # the runs that are not there yet, one JSON file each
    python studies/other_tokenizer/study.py --table           # the table, from the files

Teacher: SmolLM2-135M-Instruct. Student: glassllm, 0.85M parameters, all of them trained. Prompts: the first words of
everyday sentences, which the teacher continues. Arms: `text` (seq_kd with seq_kd_loss=nll), `aligned`
(teacher_tokenizer_alignment=bytes on the same text), `both` (the same with ce_weight=0.5). Measured along the run:
bits per byte, under the student, of continuations by the teacher that are not trained on. CPU seconds are those of the
one process on one thread, without the measuring. A run is skipped where its file is there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from gkd.config.fields import GKDConfig
from gkd.demo import glass_teacher, smollm2_teacher, translation_sentences
from gkd.training.trainer import GKDTrainer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PROMPT_WORDS, NUM_TRAIN, NUM_TEST, TOKENS, BATCH = 4, 80, 128, 32, 8
STEPS = {"text": 60, "aligned": 20, "both": 20}  # 10 steps read each text once
COMPARED = 20
MEASURED = (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 50, 60, 70, 80)
T_95 = (12.71, 4.303, 3.182, 2.776)  # of 2 to 5 seeds
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
TUNED = (1e-3, 5e-4, 2e-3)
RATE = 1e-3  # the best of three for `text`, on a seed of its own (--tune); the other arms take it as it is
DEFAULTS: dict[str, Any] = {
    "lmbda": 0.0,
    "seq_kd": True,
    "temperature": 1.0,
    "max_new_tokens": TOKENS,
    "max_length": 128,
    "divergence": "forward_kl",
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
ALIGNED = {"teacher_tokenizer_alignment": "bytes", "teacher_end_of_turn": "<eos>=<|im_end|>"}
ARMS: dict[str, dict[str, Any]] = {
    "text": {"seq_kd_loss": "nll"},
    "aligned": ALIGNED,
    "both": {**ALIGNED, "ce_weight": 0.5},
}


# ---------------------------------------------------------------------------------------------------------- the text


def prompts() -> tuple[list[str], list[str]]:
    """Beginnings of sentences, each once: for training (of all seeds), and the held-out ones."""
    found: dict[str, None] = {}
    for sentence in translation_sentences():
        words = sentence.split()
        if len(words) > PROMPT_WORDS and all(word.isascii() and word.isalpha() for word in words[:PROMPT_WORDS]):
            found[" ".join(words[:PROMPT_WORDS])] = None
    drawn = list(found)
    random.Random(0).shuffle(drawn)
    return drawn[NUM_TEST:], drawn[:NUM_TEST]


def held_out() -> list[tuple[str, str]]:
    """What the teacher writes behind the held-out prompts, as far as the student's tokens can spell it."""
    file = RESULTS / "held_out.json"
    if not file.exists():
        write(file, {"texts": _continued(prompts()[1])})
    texts: list[list[str]] = json.loads(file.read_text(encoding="utf-8"))["texts"]
    return [(prompt, text) for prompt, text in texts]


@cache
def smollm2() -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_teacher(), padding_side="left")
    return AutoModelForCausalLM.from_pretrained(smollm2_teacher(), dtype=torch.bfloat16).eval(), tokenizer


@torch.no_grad()
def _continued(asked: list[str]) -> list[tuple[str, str]]:
    model, tokenizer = smollm2()
    student = AutoTokenizer.from_pretrained(glass_teacher())
    torch.manual_seed(0)
    kept = []
    for start in range(0, len(asked), 64):
        batch = tokenizer(asked[start : start + 64], return_tensors="pt", padding=True)
        written = model.generate(**batch, max_new_tokens=TOKENS, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
        texts = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for prompt, text in zip(asked[start : start + 64], texts, strict=True):
            ids = student(text)["input_ids"][:TOKENS]
            if student.unk_token_id not in ids and len(ids) == TOKENS:
                kept.append((prompt, student.decode(ids)))
    return kept


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, texts: list[tuple[str, str]]) -> list[float]:
    """Of each text behind its prompt: -log2 p of its tokens, over its bytes."""
    model.eval()
    rows = [(tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]) for prompt, text in texts]
    longest = max(len(prompt) + len(ids) for prompt, ids in rows)
    batch = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, (prompt, ids) in enumerate(rows):
        batch[row, : len(prompt) + len(ids)] = torch.tensor([*prompt, *ids])
    log_p = model(input_ids=batch).logits.double().log_softmax(-1)  # padded on the right, so nobody looks at it
    found = []
    for row, (prompt, ids) in enumerate(rows):
        places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        nats = -sum(float(log_p[row, place, token]) for place, token in zip(places, ids, strict=True))
        found.append(nats / math.log(2) / len(texts[row][1].encode()))
    return found


# ---------------------------------------------------------------------------------------------------------- the runs


class Watch(TrainerCallback):
    """Bits per byte along the run, with the CPU seconds up to there that were not spent on measuring."""

    def __init__(self, texts: list[tuple[str, str]]) -> None:
        self.texts, self.curve, self.measuring, self.began = texts, list[dict[str, Any]](), 0.0, 0.0
        self.model: Any = None
        self.tokenizer: Any = None

    def look(self, step: int) -> None:
        now = time.process_time()
        each = bits_per_byte(self.model, self.tokenizer, self.texts)
        self.model.train()
        total = sum(len(text.encode()) for _, text in self.texts)
        mean = sum(bits * len(text.encode()) for bits, (_, text) in zip(each, self.texts, strict=True)) / total
        self.curve.append({"step": step, "cpu_seconds": now - self.began - self.measuring, "bits_per_byte": mean})
        self.measuring += time.process_time() - now

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()
        self.look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in MEASURED or state.global_step == state.max_steps:
            self.look(state.global_step)


def one_run(arm: str, seed: int, learning_rate: float, steps: int, cache: Path, batch: int = BATCH) -> dict[str, Any]:
    """Train one student and return its curve."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"seed": seed, "max_steps": steps, "learning_rate": learning_rate, "output_dir": folder}
        values |= {"per_device_train_batch_size": batch, "teacher_cache_dir": str(cache)}
        asked = prompts()[0]
        random.Random(seed).shuffle(asked)
        rows = Dataset.from_list([{"prompt": text, "completion": " and so on"} for text in asked[:NUM_TRAIN]])
        teacher, teacher_tokenizer = smollm2()
        trainer = GKDTrainer(
            model=AutoModelForCausalLM.from_pretrained(glass_teacher(), dtype=torch.float32),
            teacher_model=teacher,
            args=GKDConfig(**{**DEFAULTS, **ARMS[arm], **values}),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(glass_teacher()),
            teacher_processing_class=teacher_tokenizer,
        )
        watch = Watch(held_out())
        watch.model, watch.tokenizer = trainer.model, trainer.processing_class
        trainer.add_callback(watch)
        trainer.train()
        return {"arm": arm, "seed": seed, "learning_rate": learning_rate, "curve": watch.curve}


def text_of(seed: int) -> Path:
    """The folder of the teacher's text for a seed; the CPU seconds that it took to write stand in a file."""
    folder, record = HERE / "kept" / str(seed), RESULTS / f"written-{seed}.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        found = one_run("text", seed, 1e-9, 1, folder, batch=NUM_TRAIN)
        write(record, {"cpu_seconds": found["curve"][-1]["cpu_seconds"]})
    return folder


def write(file: Path, found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(file)


def run(name: str, arm: str, seed: int, learning_rate: float, steps: int) -> None:
    file = RESULTS / f"{name}.json"
    if file.exists():
        return
    folder = text_of(seed)
    print(f"{name}: {arm}, seed {seed}, learning rate {learning_rate}", flush=True)
    write(file, one_run(arm, seed, learning_rate, steps, folder))


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def at_step(run: dict[str, Any], step: int) -> dict[str, Any]:
    return next(point for point in run["curve"] if point["step"] == step)


# --------------------------------------------------------------------------------------------------------- the table


def best(run: dict[str, Any]) -> float:
    """The fewest bits per byte along a run: as if one knew when to stop."""
    return float(min(point["bits_per_byte"] for point in run["curve"]))


def interval(values: list[float]) -> str:
    """Mean and 95 % interval (Student's t) over the seeds."""
    if len(values) < 2:
        return " ".join(f"{value:+.3f}" for value in values)
    half = T_95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def table() -> str:
    """Every arm less `text` with the same seed and the same texts, as Markdown."""
    lines = []
    base = {seed: read(f"text-{seed}") for seed in SEEDS if (RESULTS / f"text-{seed}.json").exists()}
    lines.append("| arm | seeds | bits per byte | at equal steps | less the best of `text` | best less best |")
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for arm in ARMS:
        runs = {seed: read(f"{arm}-{seed}") for seed in base if (RESULTS / f"{arm}-{seed}.json").exists()}
        if not runs:
            continue
        ends = {seed: at_step(run, COMPARED) for seed, run in runs.items()}
        mean = statistics.mean(end["bits_per_byte"] for end in ends.values())
        differences = [
            [end["bits_per_byte"] - at_step(base[seed], COMPARED)["bits_per_byte"] for seed, end in ends.items()],
            [end["bits_per_byte"] - best(base[seed]) for seed, end in ends.items()],
            [best(run) - best(base[seed]) for seed, run in runs.items()],
        ]
        cells = ["", "", ""] if arm == "text" else [interval(values) for values in differences]
        lines.append(f"| `{arm}` | {len(runs)} | {mean:.3f} | {' | '.join(cells)} |")
    for arm in ARMS:
        last = [read(f"{arm}-{s}")["curve"][-1] for s in base if (RESULTS / f"{arm}-{s}.json").exists()]
        if last:
            per_step = [point["cpu_seconds"] / point["step"] for point in last]
            lines.append(f"CPU seconds a step, {arm}: {statistics.mean(per_step):.2f}")
    written = [read(f"written-{s}")["cpu_seconds"] for s in base]
    lines.append(f"CPU seconds to write {NUM_TRAIN} texts: {statistics.mean(written):.1f}")
    for name, which in (("before", 0), ("text, best along the run", None)):
        values = [best(run) if which is None else run["curve"][which]["bits_per_byte"] for run in base.values()]
        lines.append(f"{name}: {statistics.mean(values):.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="learning rates of `text`, on a seed of its own")
    parser.add_argument("--table", action="store_true", help="print the table of the runs that are there")
    asked = parser.parse_args()
    if asked.table:
        print(table())
        return
    if asked.tune:
        for rate in TUNED:
            run(f"tune-text-{rate:g}", "text", TUNING_SEED, rate, STEPS["text"])
    else:
        for seed in SEEDS:
            for arm in ARMS:
                run(f"{arm}-{seed}", arm, seed, RATE, STEPS[arm])


if __name__ == "__main__":
    main()
