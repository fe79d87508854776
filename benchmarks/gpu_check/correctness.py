"""What has to be right on a GPU: the loss in bf16 against float64, every way to train, and where the CPU waits."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import STUDENT, TEACHER, TINY, Shape, rows, save_model, tokenizer
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from gkd.config.fields import GKDConfig
from gkd.loss import make_divergence
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal, Head
from gkd.servers.own import free_port
from gkd.training.trainer import GKDTrainer

Found = dict[str, Any]
LAYERS = 2  # of the models that are checked, at full width


def shapes(tiny: bool) -> tuple[Shape, Shape]:
    """Of student and teacher."""
    return (TINY, TINY) if tiny else (STUDENT, TEACHER)


def definition(name: str, p: Tensor, q: Tensor) -> Tensor:
    """[N] of log-probabilities in float64: p the student's, q the teacher's."""
    if name == "forward_kl":
        return (q.exp() * (q - p)).sum(-1)
    if name == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * ((q.exp() * (q - m)).sum(-1) + (p.exp() * (p - m)).sum(-1))


def loss(device: str, tiny: bool) -> Found:
    """Relative errors of loss and gradients, eager and compiled, on ragged numbers of targets; graphs compiled."""
    student, teacher = shapes(tiny)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device, generator=generator) * scale).to(dtype)

    weight, teacher_weight = draw(student.vocab, student.hidden, scale=0.05), draw(teacher.vocab, teacher.hidden)
    teacher_weight *= 0.05
    worst: dict[str, float] = {}
    for name in ("jsd", "forward_kl", "reverse_kl"):
        divergence = make_divergence(name)
        for n in (1, 5, 257, 512):
            hidden, there = draw(n, student.hidden), draw(n, teacher.hidden)
            targets = torch.randint(0, student.vocab, (n,), device=device, generator=generator)
            weights = torch.full((n,), 1 / n, device=device)
            exact_h, exact_w = hidden.double().requires_grad_(), weight.double().requires_grad_()
            q = (there.double() @ teacher_weight.double().t()).log_softmax(-1)
            true = (definition(name, (exact_h @ exact_w.t()).log_softmax(-1), q) / n).sum()
            wanted = torch.autograd.grad(true, (exact_h, exact_w))
            for compiled in (False, True) if device == "cuda" else (False,):
                h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
                settings = LossSettings(divergence, compiled=compiled)
                signal = DenseSignal(there, Head(teacher_weight))
                out = fused_divergence(h, Head(w), signal, targets, weights, settings)
                grads = torch.autograd.grad(out.loss, (h, w))
                errors = [abs(float(out.loss.detach()) / float(true.detach()) - 1)]
                errors += [float((g.double() - t).norm() / t.norm()) for g, t in zip(grads, wanted, strict=True)]
                for what, error in zip(("loss", "hidden", "head"), errors, strict=True):
                    key = f"{'compiled' if compiled else 'eager'} {what}"
                    worst[key] = max(worst.get(key, 0.0), error)
    from torch._dynamo.utils import counters

    limits = {"loss": 1e-3, "hidden": 2e-2, "head": 2e-2}
    right = all(error < limits[key.split()[1]] for key, error in worst.items())
    return {"right": right, "worst relative errors": worst, "graphs": counters["stats"].get("unique_graphs", 0)}


# Ways to train: fields, how the models are loaded, and whether an adapter is trained.
WAYS: dict[str, dict[str, Any]] = {
    "LoRA in bf16": {},
    "LoRA, checkpointing": {"gradient_checkpointing": True},
    "all weights": {"lora": False},
    "LoRA, flash_attention_2": {"attention": "flash_attention_2"},
    "teacher of 4 bits": {"teacher_model_init_kwargs": {"load_in_4bit": True}},
    "teacher in CPU memory": {"teacher_placement": "cpu_offload"},
    "on-policy": {"lmbda": 1.0},
    "on-policy, adapter not folded": {"lmbda": 1.0, "fold_adapter": False},
}


def train(folder: Path, device: str, tiny: bool, callbacks: tuple[Any, ...] = (), **way: Any) -> GKDTrainer:
    """Two steps; the trainer afterwards."""
    lora, attention = way.pop("lora", True), way.pop("attention", "sdpa")
    student, teacher = (
        save_model(folder / name, shape, seed, layers=LAYERS)
        for seed, (name, shape) in enumerate(zip(("student", "teacher"), shapes(tiny), strict=True))
    )
    fields = {
        "lmbda": 0.0,
        "temperature": 1.0,
        "max_new_tokens": 16,
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": device == "cuda",
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": attention},
        "teacher_model_init_kwargs": {},
        **way,
    }
    fields["teacher_model_init_kwargs"] = {
        "dtype": "bfloat16",
        "attn_implementation": attention,
        **fields["teacher_model_init_kwargs"],
    }
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(str(folder / "out"), **fields),
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=adapter if lora else None,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def losses(trainer: GKDTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def way(device: str, tiny: bool, name: str) -> Found:
    """One way to train beside the plain one, and that one beside float32: on the same rows the first losses are equal
    up to the precision."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        fields = WAYS[name]
        plain: dict[str, Any] = {"lmbda": 1.0} if "lmbda" in fields else {}
        if not fields:
            plain = {"bf16": False, "teacher_model_init_kwargs": {"dtype": "float32"}}
        found, beside = (losses(train(Path(f), device, tiny, **w)) for f, w in ((first, fields), (second, plain)))
    close = 0.02 if fields and "4 bits" not in name else 0.1
    return {"right": math.isfinite(found[0]) and abs(found[0] / beside[0] - 1) < close, "loss": found, "plain": beside}


def zero(device: str, tiny: bool, stage: int, plain: Callable[[], Found]) -> Found:
    """DeepSpeed ZeRO with one rank, where everything is split but nothing has to travel, beside the plain way."""
    beside = plain()
    if "loss" not in beside:
        return {"right": False, "failed": "the plain way gave no loss", "plain": beside}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
    with tempfile.TemporaryDirectory() as folder:
        found = losses(train(Path(folder), device, tiny, deepspeed=deepspeed))
    near = abs(found[0] / beside["loss"][0] - 1) < 0.02
    return {"right": math.isfinite(found[0]) and near, "loss": found, "plain": beside["loss"]}


class CountWaits(TrainerCallback):
    """Warnings of torch that the CPU waits for the device, in the second step."""

    def __init__(self) -> None:
        self.caught: list[Any] = []
        self._recording = warnings.catch_warnings(record=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.caught = self._recording.__enter__() or []
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            torch.cuda.set_sync_debug_mode("default")
            self._recording.__exit__(None, None, None)

    @property
    def number(self) -> int:
        return sum("called a synchronizing" in str(one.message) for one in self.caught)


def waits(device: str, tiny: bool) -> Found:
    """Of a step on data: more rows must not mean more waits."""
    if device == "cpu":
        return {"right": None, "skipped": "counted on the CPU by tests/training/test_host_synchronisations.py"}
    counts = {}
    for batch in (2, 8):
        with tempfile.TemporaryDirectory() as folder:
            counter = CountWaits()
            train(Path(folder), device, tiny, (counter,), per_device_train_batch_size=batch)
            counts[batch] = counter.number
    return {"right": counts[8] <= counts[2], "waits by rows": counts}
