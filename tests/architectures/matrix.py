"""Every architecture through the trainer: rollouts token by token, loss and gradient against float64 autograd.

    python tests/architectures/matrix.py --results .cache/architectures.jsonl --page docs/models.md

Each case is a process of its own (some families touch global state), its result one line of the results file, and a
case that has its line is not run again: stop it and go on whenever. `--page` writes the table.

What a case does, on a random tiny student with a fixed random teacher of the same shape:

1. three optimizer steps at lmbda = 1 (LoRA on all linear layers, or all weights), with gradient checkpointing where
   the architecture has it;
2. `loss`: each of the first two micro-batches against the JSD in float64 from the model's own logits;
3. `gradient`: of every trained weight against autograd through those logits;
4. `rollout`: 8 prompts of 2 to 20 tokens, greedy, with 37 stop tokens so that rows leave the batch at different times,
   against `model.generate` one row at a time with the adapter apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "support"), str(HERE.parent.parent)]
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@dataclass
class Case:
    """A model type with changes to its configuration, trained with an adapter (`lora`) or whole (`full`)."""

    model_type: str
    training: str
    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.model_type, self.variant, self.training) if part)


# Changes to a configuration that touch what rollouts and the loss read: windows, caps, scales, heads.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "falcon": {"alibi": {"alibi": True, "new_decoder_architecture": False}},
    "cohere": {"scaled": {"logit_scale": 0.7}},
    "gemma2": {"window8_cap3": {"sliding_window": 8, "final_logit_softcapping": 3.0}},
    "gemma3_text": {"window6": {"sliding_window": 6}},
    "gpt_oss": {"window6": {"sliding_window": 6}},
    "granite": {"scaled": {"logits_scaling": 3.0}},
    "falcon_h1": {"scaled": {"lm_head_multiplier": 0.7}},
    "hyperclovax": {"scaled": {"logits_scaling": 0.5}},
    "mistral": {"window8": {"sliding_window": 8}},
    "ministral": {"window6": {"sliding_window": 6}},
    "qwen2": {"tied": {"tie_word_embeddings": True}},
    "llama": {"tied": {"tie_word_embeddings": True}},
    "qwen3": {"tied": {"tie_word_embeddings": True}},
}
# A router that is a linear layer and returns a tuple, or grouped linear layers: no adapter on them.
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ATTENTION_ONLY = {
    "llama4": _ATTENTION,
    "llama4_text": _ATTENTION,
    "phimoe": _ATTENTION,
    "deepseek_v4": ["q_a_proj", "q_b_proj", "kv_proj"],
}
VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "mistral3", "smolvlm", "internvl")  # trained on text alone


def cases() -> Iterator[Case]:
    """All cases, by name."""
    from configs import NOT_BUILT, NOT_DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    for kind in sorted({*DECODERS, *VISION} - NOT_DECODERS - NOT_BUILT.keys()):
        for variant in ("", *VARIANTS.get(kind, {})):
            for training in ("lora", "full"):
                yield Case(kind, training, variant)


# ---------------------------------------------------------------------------------------------------- one case


def run_case(case: Case) -> dict[str, Any]:
    """The numbers of one case; see the module's docstring."""
    import torch
    from configs import tiny_config, tiny_model

    torch.set_num_threads(1)
    changes = VARIANTS.get(case.model_type, {}).get(case.variant, {})
    config = tiny_config(case.model_type, **changes)
    student, teacher = tiny_model(config, seed=1), tiny_model(config, seed=2)
    result: dict[str, Any] = {"loss": [], "gradient": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(case, student, teacher, folder, result)
        trainer.train()
    return result | _same_completions(trainer)


def _trainer(case: Case, student: Any, teacher: Any, folder: str, result: dict[str, Any]) -> Any:
    """A trainer that holds its first two micro-batches against the oracle, into `result`."""
    import torch
    from peft import LoraConfig
    from tiny import tiny_tokenizer

    from gkd.config.fields import GKDConfig
    from gkd.training.trainer import GKDTrainer

    class Checked(GKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if len(result["loss"]) < 2 and model.training:
                weights = [p for p in model.parameters() if p.requires_grad]
                ours = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                expected = _dense_loss(model, self.teacher_model, inputs, num_items_in_batch)
                theirs = torch.autograd.grad(expected, weights, allow_unused=True)
                result["loss"].append(abs(float(loss) - float(expected)) / abs(float(expected)))
                result["gradient"].append(_distance(ours, theirs))
            return loss

    args = GKDConfig(
        output_dir=folder,
        lmbda=1.0,
        max_steps=3,
        max_new_tokens=10,
        max_length=64,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2 if case.training == "lora" else 1e-3,
        gradient_checkpointing=bool(getattr(student, "supports_gradient_checkpointing", False)),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        router_aux_loss_coef=0.0,  # of experts: a term beside the divergence, which the oracle does not have
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    peft = LoraConfig(r=4, target_modules=_adapted(case, student)) if case.training == "lora" else None
    return Checked(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=_rows(),
        processing_class=tiny_tokenizer(),
        peft_config=peft,
    )


def _adapted(case: Case, student: Any) -> Any:
    """All linear layers; beside convolutions their names, less the output of Mamba blocks, which PEFT refuses."""
    import torch

    if case.model_type in ATTENTION_ONLY:
        return ATTENTION_ONLY[case.model_type]
    if not any(isinstance(module, torch.nn.Conv1d) for module in student.modules()):
        return "all-linear"
    linear = {n.split(".")[-1] for n, m in student.named_modules() if isinstance(m, torch.nn.Linear)}
    return sorted(linear - {"out_proj", "lm_head"})


def _rows() -> Any:
    import random

    from datasets import Dataset

    draw = random.Random(0)
    rows = []
    for _ in range(24):
        prompt, answer = ([draw.randrange(40, 250) for _ in range(draw.randint(2, n))] for n in (20, 8))
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


def _dense_loss(model: Any, teacher: Any, inputs: Any, count: Any) -> Any:
    """Generalized JSD with beta 0.5 from both models' own logits, in float64, over the targets / `count`."""
    import torch
    from oracle import divergence

    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    mask = inputs["labels"][:, 1:] != -100
    student = model(**given).logits[:, :-1][mask].double().softmax(-1)
    with torch.no_grad():
        target = teacher(**given).logits[:, :-1][mask].double().softmax(-1)
    return divergence("jsd", student, target, beta=0.5).sum() / float(count)


def _distance(ours: Any, theirs: Any) -> float:
    """Euclidean distance of two lists of gradients over the second one's norm; None counts as zeros."""
    squares = norm = 0.0
    for x, y in zip(ours, theirs, strict=True):
        if x is not None or y is not None:
            x, y = (v if v is not None else 0 * w for v, w in ((x, y), (y, x)))
            squares += float((x.double() - y.double()).square().sum())
            norm += float(y.double().square().sum())
    return (squares / norm) ** 0.5 if norm else squares**0.5


def _same_completions(trainer: Any) -> dict[str, int]:
    """How many of 8 greedy completions equal `generate` for that row alone: ours, and its own padded batch."""
    import random
    from dataclasses import replace

    import torch
    from configs import PAD, STOPS
    from transformers import GenerationConfig

    draw = random.Random(1)
    prompts = [[draw.randrange(40, 250) for _ in range(length)] for length in (2, 20, 5, 11, 3, 16, 8, 13)]
    rollout = trainer.rollouts["student"]
    rollout.settings = replace(rollout.settings, temperature=0.0, max_new_tokens=14, stop_ids=tuple(STOPS))
    ours = rollout.generate(prompts, 0)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    config = GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=STOPS, pad_token_id=PAD)

    def generated(rows: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
        return [row[: next((i + 1 for i, token in enumerate(row) if token in STOPS), len(row))] for row in output]

    alone = [generated([prompt])[0] for prompt in prompts]
    counts = {"rollout": _equal(ours, alone)}
    return counts if counts["rollout"] == 8 else counts | {"batch": _equal(generated(prompts), alone)}


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> int:
    return sum(x == y for x, y in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------------------------------------------- all of them


def verdict(record: dict[str, Any]) -> str:
    """`ok`, or in a few words what is not."""
    if "error" in record:
        return record["error"]
    wrong = []
    if record["rollout"] < 8:
        wrong.append(f"rollout {record['rollout']}/8 (generate's own batch: {record['batch']}/8)")
    for name, most in (("loss", LOSS_TOLERANCE), ("gradient", GRADIENT_TOLERANCE)):
        if max(record[name]) > most:
            wrong.append(f"{name} {max(record[name]):.0e}")
    return ", ".join(wrong) or "ok"


def run_all(results: Path, only: list[str]) -> None:
    """Run what has no line in `results` yet, each in a fork of this process, which has the libraries loaded."""
    import gkd.training.trainer  # noqa: F401

    results.parent.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    todo = [case for case in cases() if case.name not in done and (not only or case.model_type in only)]
    for number, case in enumerate(todo, start=1):
        record = {"name": case.name, **asdict(case), **_in_a_fork(case)}
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{number}/{len(todo)} {case.name}: {verdict(record)}", flush=True)


def _in_a_fork(case: Case) -> dict[str, Any]:
    """`run_case` in a child; what ends it, a crash of the interpreter included, becomes the field `error`."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_report, args=(case, there))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        child.join()
        return {"error": f"the process ended with code {child.exitcode}"}
    finally:
        child.join()


def _report(case: Case, pipe: Any) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            record = run_case(case)
        except Exception as error:  # noqa: BLE001 - whatever a family raises is its row of the table
            record = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"}
    pipe.send(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path(".cache/architectures.jsonl"))
    parser.add_argument("--only", nargs="*", default=[], help="model types")
    parser.add_argument("--page", type=Path, help="write the table between this page's markers")
    options = parser.parse_args()
    run_all(options.results, options.only)
    if options.page:
        from page import write_page

        write_page(options.page, options.results)


if __name__ == "__main__":
    main()
