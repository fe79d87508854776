"""The on-policy check: how far the model that writes, a LoRA adapter folded in bf16, is from the student that trains.

    python benchmarks/on_policy.py              # SmolLM2 student, README's LoRA settings; some 12 minutes on 2 cores
    python benchmarks/on_policy.py --steps 1 8  # sooner

The student (its weights on bf16's grid, as those of any checkpoint saved in bf16) is trained with forward KL towards
its teacher. At each of the steps: KL per token, in nats, on 6 held-out texts behind their first 16 tokens (a prompt;
the second token of a text is a place where bf16 alone can be off by whole nats), from the student as it is (fp32,
adapter apart) to

| column | what |
| --- | --- |
| base | the student without its adapter: what there is to lose |
| floor, bf16 / autocast | the same student, adapter apart, in that arithmetic: the noise of bf16 as such |
| folded, bf16 / autocast | what writes the rollouts: the adapter folded by stochastic rounding |
| nearest, bf16 / autocast | the adapter folded by rounding to the nearest, for comparison |

Results are written to benchmarks/results/on_policy_<device>_smollm2.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from gkd.demo.models import smollm2_student, smollm2_teacher
from gkd.demo.texts import openwebtext_excerpts
from gkd.rollouts.folding import castable, foldable, folded

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 16  # tokens of a text
NEAREST = patch("gkd.rollouts.folding.stochastically_rounded", lambda values, dtype, _generator: values.to(dtype))


def load(folder: Path, device: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def student_of(device: str) -> Any:
    """The student with its weights on bf16's grid, and README's adapter."""
    model = load(smollm2_student(), device)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    config = LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(model, config)


def texts(count: int, tokens: int, device: str) -> Tensor:
    """Token ids [count, tokens] of web pages."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_student())
    ids = [tokenizer(text)["input_ids"][:tokens] for text in openwebtext_excerpts()]
    return torch.tensor([row for row in ids if len(row) == tokens][:count], device=device)


@contextmanager
def in_bf16(model: Any) -> Iterator[None]:
    """The frozen weights in bf16 inside; they stand on its grid, so they come back as they were."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.data = parameter.data.bfloat16()
    yield
    for parameter in frozen:
        parameter.data = parameter.data.float()


def kl(logits: Tensor, others: Tensor) -> float:
    p, q = (side[:, PROMPT:].double().log_softmax(-1) for side in (logits, others))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def measure(model: Any, ids: Tensor, step: int) -> dict[str, float]:
    model.eval()
    reference = model(ids).logits
    with model.disable_adapter():
        found = {"base": kl(reference, model(ids).logits)}
    modes = {"bf16": in_bf16(model), "autocast": torch.autocast(ids.device.type, torch.bfloat16)}
    for name, mode in modes.items():
        with mode:
            layers, others = foldable(model), castable(model) if name == "autocast" else []
            found[f"floor, {name}"] = kl(reference, model(ids).logits)
            with folded(layers, 0, step, others):
                found[f"folded, {name}"] = kl(reference, model(ids).logits)
            with NEAREST, folded(layers, 0, step, others):
                found[f"nearest, {name}"] = kl(reference, model(ids).logits)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8, 15, 30, 60, 100])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, teacher = student_of(args.device), load(smollm2_teacher(), args.device).eval()
    rows = texts(6 + 4 * max(args.steps), 64, args.device)
    held_out, rows = rows[:6], rows[6:]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    table: dict[str, dict[str, float]] = {}
    for step in range(1, max(args.steps) + 1):
        ids = rows[4 * (step - 1) : 4 * step]
        with torch.no_grad():
            target = teacher(ids).logits.log_softmax(-1)
        model.train()
        optimizer.zero_grad()
        (target.exp() * (target - model(ids).logits.log_softmax(-1))).sum(-1).mean().backward()
        optimizer.step()
        if step in args.steps:
            table[str(step)] = measure(model, held_out, step)
            print(
                f"| {step} | " + " | ".join(f"{value:.1e}" for value in table[str(step)].values()) + " |", flush=True
            )
    print("columns: step, " + "; ".join(next(iter(table.values()))))
    about = {"device": args.device, "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    path = ROOT / "benchmarks" / "results" / f"on_policy_{args.device}_smollm2.json"
    path.write_text(json.dumps({"settings": about, "kl_per_token": table}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
