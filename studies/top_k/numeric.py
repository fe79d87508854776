"""What a teacher's top K says of its whole distribution: loss and gradient on a real pair, no training.

    python studies/top_k/numeric.py        # results/numeric.json

SmolLM2-135M-Instruct and its copy with 20 of 30 layers, at places of English web texts. The gradient is that of the
student's last hidden state, which is all that the rest of the model gets to see.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.commands.sweep.outcome import commit
from gkd.demo import openwebtext_excerpts, smollm2_student, smollm2_teacher
from gkd.loss.fused import LossSettings, fused_divergence
from gkd.loss.registry import make_divergence
from gkd.loss.signals import DenseSignal, Head
from gkd.models.head import head_of

HERE = Path(__file__).resolve().parent
TEXTS, TOKENS = 6, 64
KS = (1, 2, 4, 8, 16, 64)
TAILS = ("bucket", "renormalize", "renormalize_both", "ignore")


@torch.no_grad()
def hidden_states(name: str, ids: torch.Tensor) -> tuple[torch.Tensor, Head]:
    """Of all places, flat, and the head that projects them."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    return model.model(ids).last_hidden_state.flatten(0, 1), head_of(model)


def gradient(student: torch.Tensor, head: Head, teacher: DenseSignal, settings: LossSettings) -> tuple[Any, Any]:
    """The divergence [N] of each place, and its gradient [N, D]."""
    hidden = student.clone().requires_grad_(True)
    count = len(hidden)
    out = fused_divergence(hidden, head, teacher, torch.zeros(count, dtype=torch.long), torch.ones(count), settings)
    out.loss.backward()
    return out.divergence.double(), hidden.grad.double()


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_teacher())
    texts = [ids for text in openwebtext_excerpts() if len(ids := tokenizer(text)["input_ids"]) >= TOKENS][:TEXTS]
    ids = torch.tensor([row[:TOKENS] for row in texts])
    student, head = hidden_states(str(smollm2_student()), ids)
    hidden, teachers_head = hidden_states(str(smollm2_teacher()), ids)
    head = Head(head.weight.detach())
    teacher = DenseSignal(hidden, Head(teachers_head.weight.detach()))
    places = range(0, len(hidden), 128)
    log_p = [teacher.head.logits(hidden[i : i + 128]).log_softmax(-1) for i in places]
    about = {"command": "python studies/top_k/numeric.py", "commit": commit(HERE), "places": len(hidden)}
    rows: list[dict[str, Any]] = []
    for name in ("forward_kl", "reverse_kl"):
        divergence = make_divergence(name)
        full, full_gradient = gradient(student, head, teacher, LossSettings(divergence))
        for k in KS:
            tail = torch.cat([1 - p.topk(k).values.exp().sum(-1) for p in log_p]).double()
            for way in TAILS:
                try:
                    settings = LossSettings(divergence, teacher_top_k=k, top_k_tail=way)
                except ValueError:
                    continue  # this divergence has no such form
                value, slope = gradient(student, head, teacher, settings)
                cosine = torch.nn.functional.cosine_similarity(slope, full_gradient, dim=-1, eps=1e-12)
                row = {
                    "divergence": name,
                    "k": k,
                    "tail": way,
                    "teacher's tail": tail.mean().item(),
                    "loss / full loss": (value.sum() / full.sum()).item(),
                    "places above the full loss": (value > full + 1e-5).double().mean().item(),
                    "cosine": cosine.mean().item(),
                    "length / full": (slope.norm(dim=-1).sum() / full_gradient.norm(dim=-1).sum()).item(),
                }
                rows.append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
                print(rows[-1], flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    lines = ",\n".join(map(json.dumps, rows))
    text = json.dumps(about, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
    (HERE / "results" / "numeric.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
