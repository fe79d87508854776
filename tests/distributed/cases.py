"""What a launched process trains: one small training after the other, each written down for the test to read.

One launch holds many trainings because starting two processes costs more than a training. The test process runs the
same cases alone, with both ranks' rows in one batch: what the ranks wrote must be equal to that.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from other_tokens import other_model, other_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_rows, tiny_tokenizer, tiny_vision_model
from transformers import GenerationConfig, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from views import viewed_rows

import gkd.training.trainer
from gkd.config.fields import GKDConfig
from gkd.models.generation_mode import generation_mode
from gkd.training.trainer import GKDTrainer

SPLIT_ALL = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
RANKS = 2
ROWS = 24
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 5,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "lmbda": 0.5,
    "max_new_tokens": 8,
    "max_length": 128,
    "temperature": 1.0,
    "seed": 5,
    "bf16": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"seed": 1},
    "tied": {"seed": 1, "tie_word_embeddings": True},
    "vision": {"vision": "gemma3", "seed": 1},
    "teacher": {"seed": 2, "hidden": 48, "layers": 3},
}
ADAPTERS = ("math", "chat")
# One step of plain SGD over 20 ragged rows: what changes in the weights is the gradient.
VIEWS: dict[str, Any] = {
    "per_device_train_batch_size": 5,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "seq_kd": True,
    "teacher_cache_dir": "off",
}
# Half of it the student's random bytes, most of which are no text: a rank may have nothing to compare.
ALIGNED: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1,
    "max_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
}
SEVERAL = ("math", "chat", "itself", "itself", "math")  # the rows' teachers in turn
OF_ITSELF = ("live", "ema")
KINDS = ("split", "math", "itself", "split", "math")  # the same, of teachers of several kinds
PROBE = torch.tensor([[257, 65, 66, 67, 258]])
STOPS = [258, *range(64)]  # so many stop tokens that untrained models stop, each row somewhere else


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        name: of its results.
        args: fields of GKDConfig that differ from DEFAULTS.
        environment: variables of the launcher that choose how the ranks are wired.
        engine: what the student must be wrapped in: "ddp", "zero-1" ... (see `wiring`), "" for not at all.
        student: which of MODELS.
        lora: train an adapter, not the model.
        one_row: every row of the data is the same.
        in_memory: pass model objects rather than names.
        disturb: give every rank's global random streams a state of their own before the trainer and before training.
        shares: the teacher is the student's base: "itself", with an adapter ("math"), or "several" of these; "kinds":
            two on that base, and one with weights of its own, split up over the ranks; or the student itself, which
            reads other prompts then: "live", or its average, "ema".
        resume: stop after this many steps, build everything anew and go on from the checkpoint.
        views: the teacher reads prompts of its own (tests/support/views.py).
        aligned: the teacher has another tokenizer, and is compared by bytes.
        rewarded: completions have a reward: the share of small letters.
        refused: the words of the ValueError that must come instead of a training.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    engine: str = ""
    student: str = "untied"
    lora: bool = True
    one_row: bool = False
    in_memory: bool = False
    disturb: bool = False
    shares: str = ""
    resume: int | None = None
    views: bool = False
    aligned: bool = False
    rewarded: bool = False
    refused: str | None = None

    def alone(self) -> Case:
        """The same on one process, undisturbed and never stopped: both ranks' rows in one batch."""
        batch = self.args.get("per_device_train_batch_size", DEFAULTS["per_device_train_batch_size"])
        args = {**self.args, "per_device_train_batch_size": RANKS * batch}
        for name in ("deepspeed", "teacher_placement"):
            args.pop(name, None)
        kept = ("student", "lora", "one_row", "shares", "views", "aligned", "rewarded")
        return Case(self.name, args, **{name: getattr(self, name) for name in kept})


def save_models(folder: Path) -> None:
    """The models of all cases, on disk: under ZeRO-3 a model is split up while it is loaded; and a teacher's adapters
    for the first of them."""
    for seed, name in enumerate(ADAPTERS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lora = LoraConfig(r=4, target_modules=["k_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM")
            tuned = get_peft_model(_model("untied"), lora)
            for parameter in (p for n, p in tuned.named_parameters() if "lora_B" in n):
                parameter.data.normal_(std=0.3)
        tuned.save_pretrained(folder / name)
    for name in MODELS:
        _model(name).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    other_model().save_pretrained(folder / "other")
    other_tokenizer().save_pretrained(folder / "other")


def _model(name: str) -> Any:
    values = dict(MODELS[name])
    vision = values.pop("vision", None)
    model = tiny_model(**values) if vision is None else tiny_vision_model(vision, **values)
    model.generation_config = GenerationConfig(eos_token_id=STOPS, pad_token_id=256)
    return model


def _in_memory(folder: Path) -> Any:
    """The model in `folder`, whole on every rank: its class alone knows nothing of ZeRO-3."""
    model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=not model.config.tie_word_embeddings)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def run(case: Case, models: Path, folder: Path) -> None:
    """Train (or be refused) and write everything there is to compare into `folder / case.name`."""
    os.environ.update(case.environment)
    try:
        out = folder / case.name
        out.mkdir(parents=True, exist_ok=True)
        if case.refused is not None:
            _expect_refusal(case, models, out)
            return
        before: list[list[Any]] = []
        if case.resume is not None:
            stop = {**case.args, "save_strategy": "steps", "save_steps": case.resume}
            stopped, before = _build(dataclasses.replace(case, args=stop), models, out)
            stopped.add_callback(_StopAt(case.resume))
            stopped.train()
        trainer, windows = _build(case, models, out)
        checkpoint = None if case.resume is None else str(out / f"checkpoint-{case.resume}")
        trainer.train(resume_from_checkpoint=checkpoint)
        assert wiring(trainer) == case.engine, f"{case.name}: {wiring(trainer)} instead of {case.engine}"
        trainer.save_model(str(out / "final"))
        _write(trainer, before + windows, out)
        trainer.accelerator.wait_for_everyone()
    finally:
        for name in case.environment:
            os.environ.pop(name, None)


class _StopAt(TrainerCallback):
    """Ends a training behind a step, which has been saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def _build(case: Case, models: Path, out: Path) -> tuple[GKDTrainer, list[list[Any]]]:
    rank = int(os.environ.get("RANK", 0))
    if case.disturb:
        _disturb(rank)
    student: Any = str(models / case.student)
    teacher: Any = str(models / "teacher")
    rows = tiny_rows(1) * ROWS if case.one_row else tiny_rows(ROWS)
    rows = viewed_rows(20) if case.views else rows
    shared: dict[str, Any] = {}
    if case.aligned:
        teacher, shared = str(models / "other"), {"teacher_tokenizer_alignment": "bytes"}
        teacher = None if "teacher_server_url" in case.args else teacher
    if case.shares in OF_ITSELF:
        teacher, shared = None, {"self_teacher": case.shares}
        rows = [{**row, "teacher_system": "Be brief." if i % 3 else None} for i, row in enumerate(rows)]
    elif case.shares:
        teacher, shared = None, {"share_base_model": True}
        if case.shares in ADAPTERS:
            shared["teacher_adapter_name_or_path"] = str(models / case.shares)
        if case.shares == "several":
            shared["teacher_adapters"] = {"math": str(models / "math"), "chat": str(models / "chat"), "itself": None}
            rows = [{**row, "teacher": SEVERAL[i % len(SEVERAL)]} for i, row in enumerate(rows)]
        if case.shares == "kinds":
            placement = {"placement": "zero3"} if case.engine else {}
            split = {"model": str(models / "teacher"), **placement}
            shared["teachers"] = {"math": {"adapter": str(models / "math")}, "split": split, "itself": None}
            rows = [{**row, "teacher": KINDS[i % len(KINDS)]} for i, row in enumerate(rows)]
    args = GKDConfig(output_dir=str(out), **{**DEFAULTS, **shared, **case.args})
    if case.in_memory:
        student, teacher = _in_memory(models / case.student), _in_memory(models / "teacher")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=not case.shares,  # an adapter that does nothing yet would be its own base as a teacher
    )
    evaluates = args.eval_strategy != "no"
    trainer = GKDTrainer(
        student,
        teacher,
        args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(tiny_rows(7, seed=9)) if evaluates else None,
        processing_class=tiny_tokenizer(),
        peft_config=lora if case.lora else None,
        reward=_share_of_small_letters if case.rewarded else None,
    )
    trainer.remove_callback(PrinterCallback)
    if case.engine:  # the launch is what it is meant to be: two processes that know of each other
        assert args.world_size == dist.get_world_size() == trainer.accelerator.num_processes == RANKS
    if case.disturb:
        _disturb(rank)
    return trainer, _remember_windows()


def _share_of_small_letters(completion: str, row: dict[str, Any]) -> float:
    return sum(letter.islower() for letter in completion) / max(1, len(completion))


def _disturb(rank: int) -> None:
    random.seed(100 + rank)
    np.random.seed(100 + rank)
    torch.manual_seed(100 + rank)


def _remember_windows() -> list[list[Any]]:
    """From now on every window's sequences after the rollout are kept: row, source, ids, whether trained on."""
    windows: list[list[Any]] = []
    original = getattr(gkd.training.trainer.count, "original", gkd.training.trainer.count)

    def count(sequences: list[Any]) -> torch.Tensor:
        windows.append([[s.row, s.source, s.input_ids, s.num_targets] for s in sequences])
        return original(sequences)

    count.original = original  # type: ignore[attr-defined]
    gkd.training.trainer.count = count  # type: ignore[assignment]
    return windows


def wiring(trainer: GKDTrainer) -> str:
    """How the student is wrapped: "" (bare), "ddp", "zero-1", "zero-2"; "zero-3" if all of it is split up."""
    wrapped = trainer.model_wrapped
    kind = type(wrapped).__name__
    if kind == "DistributedDataParallel":
        return "ddp"
    if kind != "DeepSpeedEngine":
        return ""
    stage = wrapped.zero_optimization_stage()
    if stage == 3:
        own = () if trainer.args.shares_weights else (trainer.teacher_model,)
        parameters = [p for model in (wrapped, *own) for p in model.parameters()]
        assert all(hasattr(p, "ds_id") for p in parameters)
        # the forward passes of an evaluation leave parameters whole
        if trainer.args.eval_strategy == "no" and any(p.numel() > 0 for p in parameters):
            return "zero-3 partly"
    return f"zero-{stage}"


def _largest_whole(teacher: Any) -> int:
    """Elements of the teacher's largest weight that this rank holds as a whole."""
    return max((p.numel() for p in teacher.parameters()), default=0) if teacher is not None else 0


def _write(trainer: GKDTrainer, windows: list[list[Any]], out: Path) -> None:
    accelerator = trainer.accelerator
    (out / f"windows-{accelerator.process_index}.json").write_text(json.dumps(windows))
    checkpointing = trainer.args.gradient_checkpointing_kwargs or {}
    result = {
        "logs": trainer.state.log_history,
        "ledger": trainer.ledger.as_dict(),
        "stop_ids": trainer.stop_ids,
        "use_reentrant": checkpointing.get("use_reentrant"),
        "device": str(accelerator.device),
        "teacher_whole": _largest_whole(trainer.teacher_model),
    }
    with generation_mode(trainer.model_wrapped, None) as model:
        logits = model(input_ids=PROBE).logits.float()
    if accelerator.is_main_process:
        (out / "result.json").write_text(json.dumps(result))
        save_file({"logits": logits}, out / "logits.safetensors")


def _expect_refusal(case: Case, models: Path, out: Path) -> None:
    assert case.refused is not None
    with pytest.raises(ValueError, match=case.refused) as refusal:
        _build(case, models, out)
    (out / "refusal.txt").write_text(str(refusal.value))
