"""MiniMind-style models made from scratch, so that recipes/kd_minimind.py runs anywhere: no hub, nothing downloaded.

MiniMind (github.com/jingyaogong/minimind) is a family of very small Llama-like models, with and without experts. What
is made here has its shape in small (8 query and 2 key-value heads, RMSNorm, tied embeddings, 4 experts of which 2 are
used and one shared) as ordinary Hugging Face models, and is fine-tuned for a minute on toy conversations.

| function                | model                     | parameters |
| ----------------------- | ------------------------- | ---------- |
| minimind_teacher()      | 2 layers of 192, Llama    | 0.9M       |
| minimind_student()      | 1 layer of 96, Llama      | 0.1M       |
| minimind_student_moe()  | 1 layer of 96, Qwen2-MoE  | 0.4M       |
| minimind_specialists()  | two as the teacher        | 0.9M each  |

Of the specialists one has seen nothing but numbers, and one nothing but words; recipes/gkd_two_teachers.py makes one
student of both.

`python -m gkd.demo.minimind student-moe` makes one and prints its folder; `rows` is the toy data.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gkd.demo.models import cached_folder

ROWS, ROWS_OF_THE_MODELS = 400, 1500  # of the data set; other ones that the models are fine-tuned on
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_OPPOSITES = {"hot": "cold", "big": "small", "old": "new", "fast": "slow", "dark": "light", "soft": "hard"}
_KINDS = {"numbers": (0, 1), "words": (2, 3, 4)}  # of `_exchange`, by who knows them
_COLOURS = ["red", "blue", "green", "white", "black", "brown"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Shape:
    """A model and how long it is fine-tuned before the distillation (steps of 16 conversations)."""

    hidden: int
    layers: int
    steps: int
    experts: int = 0
    kinds: str | None = None  # of the conversations that it is fine-tuned on, a key of _KINDS; None is all


TEACHER = Shape(hidden=192, layers=2, steps=350)
STUDENT = Shape(hidden=96, layers=1, steps=60)
STUDENT_MOE = Shape(hidden=96, layers=1, steps=60, experts=4)
SPECIALISTS = {name: Shape(hidden=192, layers=2, steps=600, kinds=name) for name in _KINDS}


def minimind_teacher() -> Path:
    """Folder of the teacher; made at the first call."""
    return _model("minimind-teacher", TEACHER)


def minimind_student() -> Path:
    """Folder of the student: as in the article, already fine-tuned, but less."""
    return _model("minimind-student", STUDENT)


def minimind_student_moe() -> Path:
    """Folder of the student with experts; its config asks for the auxiliary loss of the router."""
    return _model("minimind-student-moe", STUDENT_MOE)


def minimind_specialists() -> dict[str, dict[str, str]]:
    """The value of the field `teachers`: "numbers" counts and adds, "words" knows days, opposites and orders."""
    return {name: {"model": str(_model(f"minimind-{name}", shape))} for name, shape in SPECIALISTS.items()}


def minimind_questions(rows: int = 2000) -> list[dict[str, Any]]:
    """Questions with a right answer, each once; in the column `teacher` which of the specialists knows it."""
    draw, found = random.Random(0), {}
    for number in range(rows):
        name = list(_KINDS)[number % 2]
        question, answer = _exchange(draw, _KINDS[name])
        found[question] = {"prompt": [{"role": "user", "content": question}], "completion": answer, "teacher": name}
    return list(found.values())


def minimind_rows() -> Path:
    """A .jsonl file of toy `conversations`."""

    def write(folder: Path) -> None:
        with (folder / "sft_data.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in toy_conversations(ROWS))

    return cached_folder("minimind-rows", {"rows": ROWS}, write) / "sft_data.jsonl"


def toy_conversations(rows: int, seed: int = 0, kinds: Sequence[int] = range(5)) -> list[dict[str, Any]]:
    """Conversations of one or two turns: counting, sums, days, opposites, words said backwards."""
    draw = random.Random(seed)
    return [
        {
            "conversations": [
                {"role": role, "content": text}
                for _ in range(draw.randint(1, 2))
                for role, text in zip(("user", "assistant"), _exchange(draw, kinds), strict=True)
            ]
        }
        for _ in range(rows)
    ]


def _exchange(draw: random.Random, kinds: Sequence[int]) -> tuple[str, str]:
    kind = draw.choice(kinds)
    if kind == 0:
        start, length = draw.randint(0, 30), draw.randint(2, 6)
        numbers = " ".join(str(number) for number in range(start, start + length))
        return f"Count from {start} to {start + length - 1}.", f"{numbers}."
    if kind == 1:
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
    if kind == 2:
        day = draw.randrange(7)
        return f"Which day comes after {_DAYS[day]}?", f"After {_DAYS[day]} comes {_DAYS[(day + 1) % 7]}."
    if kind == 3:
        word = draw.choice(list(_OPPOSITES))
        return f"What is the opposite of {word}?", f"The opposite of {word} is {_OPPOSITES[word]}."
    words = draw.sample(_COLOURS, 3)
    return f"Say {' '.join(words)} backwards.", f"{' '.join(reversed(words))}."


# ----------------------------------------------------------------------------------------------------- making


def _model(name: str, shape: Shape) -> Path:
    made_of = {key: value for key, value in asdict(shape).items() if value is not None}
    return cached_folder(name, {"shape": made_of, "rows": ROWS_OF_THE_MODELS}, lambda out: _make(out, shape))


def _make(out: Path, shape: Shape) -> None:
    import torch

    rows = toy_conversations(ROWS_OF_THE_MODELS, seed=1)
    tokenizer = _tokenizer(rows)  # of all kinds, whatever the model has seen
    if shape.kinds is not None:
        rows = toy_conversations(ROWS_OF_THE_MODELS, seed=1, kinds=_KINDS[shape.kinds])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.hidden)
        model = _untrained(shape, tokenizer)
        _fine_tune(model, tokenizer, rows, shape.steps)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tokenizer(rows: list[dict[str, Any]]) -> Any:
    """A byte-level BPE trained on the rows, with MiniMind's special tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    backend.train_from_iterator((turn["content"] for row in rows for turn in row["conversations"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _untrained(shape: Shape, tokenizer: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "intermediate_size": 64 * -(-8 * shape.hidden // 192),  # 8/3 of the width, up to a multiple of 64
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.experts:
        values |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": values["intermediate_size"],
            "shared_expert_intermediate_size": values["intermediate_size"],
            "norm_topk_prob": True,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.1,
        }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe" if shape.experts else "llama", **values))


def _fine_tune(model: Any, tokenizer: Any, rows: list[dict[str, Any]], steps: int) -> None:
    """Plain cross-entropy on the assistants' turns."""
    import torch
    from datasets import Dataset

    from gkd.data.prepare import prepare_dataset
    from gkd.data.sequences import PaddingCollator

    prepared, _ = prepare_dataset(
        Dataset.from_list(rows), tokenizer, max_length=None, max_prompt_length=None, assistant_turns="all", name="toy"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for batch in _batches(list(prepared), PaddingCollator(tokenizer.pad_token_id), steps):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def _batches(rows: list[Any], collate: Any, steps: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for _ in range(steps):
        yield collate(draw.sample(rows, 16))


def main(what: str) -> None:
    """Make one of the models, or the rows, and print where it is."""
    makers = {
        "teacher": minimind_teacher,
        "student": minimind_student,
        "student-moe": minimind_student_moe,
        "rows": minimind_rows,
    }
    if what not in makers:
        raise SystemExit(f"error: {what!r} is unknown: name one of {', '.join(makers)}")
    with redirect_stdout(sys.stderr):  # a shell takes the folder from stdout, and nothing else
        folder = makers[what]()
    print(folder)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
