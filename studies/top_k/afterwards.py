"""A sweep's students once more: what they put outside the teacher's most likely tokens, and how sure they are.

    python studies/top_k/afterwards.py outputs/top_k studies/top_k/results/afterwards.json

At every place of what the teacher writes at T = 1 behind the held-out prompts, of the glass pair: `tail_K` is the mass
outside the teacher's K most likely tokens (of the teacher itself under `teacher`), `overconfidence` the student's
largest probability less what the teacher gives the same token. `before` is the student before the training.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.demo import glass_student, glass_teacher

ROOT = Path(__file__).resolve().parents[2]
KS = (1, 4, 16)
PROMPTS, NEW_TOKENS = 96, 24


class Texts:
    """What the teacher writes, a batch for each length of a prompt, and its probabilities there."""

    def __init__(self) -> None:
        rows = list(runpy.run_path(str(ROOT / "recipes" / "gkd_glass.py"))["load_data"](None)["eval"])[:PROMPTS]
        tokenizer = AutoTokenizer.from_pretrained(glass_teacher())
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        teacher = loaded(glass_teacher())
        stops = torch.tensor(teacher.generation_config.eos_token_id)
        self.batches: list[tuple[Tensor, Tensor, int]] = []
        torch.manual_seed(0)
        for length in sorted({len(prompt) for prompt in prompts}):
            ids = torch.tensor([prompt for prompt in prompts if len(prompt) == length])
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, teacher(ids).logits[:, -1].softmax(-1).multinomial(1)], dim=1)
            ends = torch.isin(ids[:, length:], stops)
            self.batches.append((ids, ends.cumsum(1) - ends.long() == 0, length))  # up to and with the first end
        self.teacher = self.probabilities(teacher)

    def probabilities(self, model: Any) -> Tensor:
        """At every place of the texts, [places, vocabulary]."""
        parts = [model(ids).logits[:, length - 1 : -1].softmax(-1)[kept] for ids, kept, length in self.batches]
        return torch.cat(parts)

    def measured(self, model: Any) -> dict[str, float]:
        """Of one model."""
        own = self.probabilities(model)
        found = {}
        for k in KS:
            likely = self.teacher.topk(k, dim=-1).indices
            found[f"tail_{k}"] = float(1 - own.gather(1, likely).sum(-1).mean())
        largest, token = own.max(-1, keepdim=True)
        found["overconfidence"] = float((largest - self.teacher.gather(1, token)).mean())
        return {name: round(value, 5) for name, value in found.items()}


def loaded(folder: Path | str) -> Any:
    """In float32, to be measured."""
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


@torch.no_grad()
def main() -> None:
    """Measure every run of the sweep."""
    torch.set_num_threads(1)
    sweep, path = map(Path, sys.argv[1:])
    swept = json.loads((sweep / "results.json").read_text(encoding="utf-8"))
    texts = Texts()
    before, teacher = texts.measured(loaded(glass_student())), texts.measured(loaded(glass_teacher()))
    runs = []
    for run in swept["runs"]:
        words = run["command"].split()
        folder = words[words.index("--output_dir") + 1]
        after = texts.measured(PeftModel.from_pretrained(loaded(glass_student()), folder).eval())
        measures = {name: {"before": before[name], "after": after[name], "teacher": teacher[name]} for name in after}
        runs.append({"cell": run["cell"], "seed": run["seed"], "measures": measures})
        print(run["cell"], run["seed"], after, flush=True)
    about = {"command": " ".join(["python", "studies/top_k/afterwards.py", *sys.argv[1:]])}
    about |= {name: swept[name] for name in ("seeds", "cells", "failed")} | {"commit": swept["runs"][0]["commit"]}
    lines = ",\n".join(json.dumps(run) for run in runs)
    path.write_text(json.dumps(about, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
