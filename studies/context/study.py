"""Does a system prompt go into an adapter? Seeds of recipes/gkd_context.py, and as many with nothing to learn.

    python studies/context/study.py --choose                # which prompt this model follows, on training sentences
    python studies/context/study.py                         # the runs that are not there yet, one JSON file each
    python studies/context/study.py --arm control --seeds 0 1 2 3 4
    python studies/context/study.py --table                 # the table, from the files

Arms: `context` (the teacher alone reads the system prompt) and `control` (both read the student's prompt). Measured on
sentences that are not trained on: the share of answers in French, greedy and sampled at T = 1, of the student before
and after and of the teacher; and the perplexity of English web texts. A run is skipped where its file is there.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gkd.demo import smollm2_teacher
from gkd.run import build_trainer, parse

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
RECIPE = runpy.run_path(str(HERE.parents[1] / "recipes" / "gkd_context.py"), run_name="recipe")
# Smaller than the recipe's, so that ten runs fit into an evening of one busy core; the rest is the recipe's.
SMALLER = {"dtype": "bfloat16", "per_device_train_batch_size": 4, "max_new_tokens": 12, "log_completions": "false"}
ARMS = ("context", "control")
NUM_TEST, NUM_TEXTS, NUM_CHOOSING, BATCH, ANSWER_TOKENS = 48, 16, 32, 48, 12
CANDIDATES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "at most three words": ("Answer in at most three words.", lambda text: 1 <= len(text.split()) <= 3),
    "a numbered list": ("Answer every question with a numbered list.", lambda text: bool(re.match(r"\s*1[.)]", text))),
    "a JSON object": ("Answer every question with a JSON object.", lambda text: text.lstrip(" `json\n")[:1] == "{"),
    "a question": ("Answer every question with another question.", lambda text: "?" in text),
    "French": (RECIPE["SYSTEM"], RECIPE["in_french"]),
}

Chat = list[dict[str, str]]


def chats(rows: Any, system: str | None = None) -> list[Chat]:
    front = [] if system is None else [{"role": "system", "content": system}]
    return [[*front, *row["prompt"]] for row in rows]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, asked: list[Chat], *, sampled: bool, seed: int = 0) -> list[str]:
    """One answer for each chat, of at most ANSWER_TOKENS tokens: greedy, or sampled at T = 1."""
    model.eval()
    torch.manual_seed(seed)
    how: dict[str, Any] = {"do_sample": sampled}
    if sampled:
        how |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    texts: list[str] = []
    for start in range(0, len(asked), BATCH):
        batch = tokenizer.apply_chat_template(
            asked[start : start + BATCH],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        written = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, use_cache=True, **how)
        texts += tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: list[str], max_length: int = 96) -> float:
    """exp of the mean over all tokens of all texts."""
    model.eval()
    total, number = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:max_length]])
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        number += ids.shape[1] - 1
    return math.exp(total / number)


def measured(
    model: Any, tokenizer: Any, data: dict[str, Any], seed: int = 0, system: str | None = None
) -> dict[str, Any]:
    """Shares of answers in French, in percent, the perplexity, and the first answers."""
    asked = chats(data["prompts"].select(range(NUM_TEST)), system)
    greedy = answers(model, tokenizer, asked, sampled=False)
    sampled = answers(model, tokenizer, asked, sampled=True, seed=seed)
    return {
        "greedy": statistics.mean(map(RECIPE["score"], greedy, asked)),
        "sampled": statistics.mean(map(RECIPE["score"], sampled, asked)),
        "perplexity": perplexity(model, tokenizer, data["held_out_text"][:NUM_TEXTS]),
        "answers": [{"asked": asked[i][-1]["content"], "greedy": greedy[i], "sampled": sampled[i]} for i in range(8)],
    }


def one_run(arm: str, seed: int, steps: int) -> None:
    """Train one adapter and write what was measured; `before` and `teacher` stand in a file of their own."""
    file, reference = RESULTS / f"{arm}-{seed}.json", RESULTS / "reference.json"
    if file.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        values = {**SMALLER, "seed": seed, "max_steps": steps, "output_dir": folder, "logging_steps": 1}
        settings = parse(
            RECIPE["DEFAULTS"], [part for name, value in values.items() for part in (f"--{name}", str(value))]
        )
        data = RECIPE["load_data"](settings)
        if arm == "control":
            data["train"] = data["train"].remove_columns("teacher_system")
        trainer = build_trainer(settings, data)
        model, tokenizer = trainer.model, trainer.processing_class
        tokenizer.padding_side = "left"
        if not reference.exists():  # the new adapter does nothing
            before = measured(model, tokenizer, data)
            write(reference, {"before": before, "teacher": measured(model, tokenizer, data, system=RECIPE["SYSTEM"])})
        print(f"{arm}, seed {seed}", flush=True)
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        moved = max(
            float(weight.detach().abs().max()) for name, weight in model.named_parameters() if "lora_B" in name
        )
        write(
            file,
            {"arm": arm, "seed": seed, "steps": steps, "after": measured(model, tokenizer, data, seed)}
            | {"losses": losses, "largest_weight_of_lora_B": moved, "training_seconds": seconds},
        )


def write(file: Path, found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(file)


def choose() -> None:
    """The share of greedy answers that follow each candidate, with the system prompt and without."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_teacher()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    settings = parse(RECIPE["DEFAULTS"], ["--output_dir", "unused"])
    rows = RECIPE["load_data"](settings)["train"].select(range(NUM_CHOOSING))
    plain, found = answers(model, tokenizer, chats(rows), sampled=False), {}
    for name, (system, follows) in CANDIDATES.items():
        told = answers(model, tokenizer, chats(rows, system), sampled=False)
        shares = [100 * sum(map(follows, texts)) / len(rows) for texts in (told, plain)]
        found[name] = {"system": system, "with": shares[0], "without": shares[1], "answers": told[:4]}
        print(f"{name}: {shares[0]:.0f} % with the system prompt, {shares[1]:.0f} % without", flush=True)
    write(RESULTS / "choice.json", found)


def table() -> str:
    """Mean and standard error over the seeds, as Markdown."""
    reference = json.loads((RESULTS / "reference.json").read_text(encoding="utf-8"))
    runs = {
        arm: [json.loads(f.read_text(encoding="utf-8")) for f in sorted(RESULTS.glob(f"{arm}-*.json"))] for arm in ARMS
    }
    lines = [
        "| measure | before | teacher | " + " | ".join(f"after, {arm} ({len(runs[arm])})" for arm in ARMS) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(ARMS),
    ]
    names = {
        "greedy": "in French, greedy, %",
        "sampled": "in French, sampled, %",
        "perplexity": "perplexity, web text",
    }
    for key, name in names.items():
        before, teacher = (reference[who][key] for who in ("before", "teacher"))
        theirs = "" if key == "perplexity" else f"{teacher:.1f}"
        after = [spread([run["after"][key] for run in runs[arm]]) for arm in ARMS]
        lines.append(f"| {name} | {before:.1f} | {theirs} | " + " | ".join(after) + " |")
        whole = before if key == "perplexity" else teacher
        of = "before" if key == "perplexity" else "the teacher's"
        after = [spread([100 * run["after"][key] / whole for run in runs[arm]]) for arm in ARMS]
        lines.append(f"| the same, % of {of} | {100 * before / whole:.1f} | | " + " | ".join(after) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard error."""
    if len(values) < 2:
        return " ".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arm", choices=ARMS, default="context", help="what the teacher reads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="which seeds to run")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--choose", action="store_true", help="measure the candidates for the system prompt")
    parser.add_argument("--table", action="store_true", help="print the table of the runs that are there")
    asked = parser.parse_args()
    if asked.choose:
        choose()
    elif asked.table:
        print(table())
    else:
        for seed in asked.seeds:
            one_run(asked.arm, seed, asked.steps)


if __name__ == "__main__":
    main()
