"""A student, rollouts, a teacher's scores and a trainer beside the fake server."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from training import config
from transformers import TrainerCallback

from gkd.data.targets import target_mask
from gkd.loss import make_divergence
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import Head
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.vllm import VLLMRollout
from gkd.servers.checks import served_model
from gkd.servers.client import VLLMClient
from gkd.training.trainer import GKDTrainer

STOP = 258
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


def client_of(*servers, timeout=20.0):
    return VLLMClient(",".join(server.url for server in servers), field="rollout_server_url", timeout=timeout)


def student_of(seed=1, **options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(tiny_model(seed=seed), LoraConfig(**(LORA | options)))


def rollout_of(server, tmp_path, student, client=None, source="student", shares_device=False, **settings):
    settings = SamplingSettings(**({"max_new_tokens": 12, "stop_ids": (STOP, 10)} | settings))
    client = client or client_of(server)
    options = {"get_model": lambda: student} if source == "student" else {}
    return VLLMRollout(
        client,
        served_model(client),
        settings,
        seed=4,
        source=source,
        adapter_dir=str(tmp_path / "adapters"),
        shares_device=shares_device,
        **options,
    )


def ragged_batch():
    """Four rows of different lengths, prompts untouched, one row with a gap, one without any target."""
    rows = [[7, 3, 90, 4, 5, 258], [8, 1, 250, 251, 17, 16, 15, 14, 258], [1, 2, 3], [9, 9]]
    starts = [2, 4, 3, 1]
    width = max(map(len, rows))
    ids = torch.zeros(4, width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, start : len(row)] = ids[i, start : len(row)]
    labels[1, 6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(signal, batch, name, top_k):
    """Loss and its gradient in the student's hidden states, which are random."""
    labels = batch["labels"]
    targets = labels[:, 1:][target_mask(labels)]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(targets), 16, generator=generator).requires_grad_()
    head = Head(torch.randn(259, 16, generator=generator) * 0.3)
    settings = LossSettings(make_divergence(name), teacher_top_k=top_k)
    output = fused_divergence(hidden, head, signal, targets, torch.ones(len(targets)) / 7, settings)
    output.loss.backward()
    return output, hidden.grad


def trainer_with(folder, teacher=None, **values):
    """Three greedy steps of a LoRA student, with a teacher model or with servers."""
    torch.manual_seed(6)  # the adapter's initial values
    return GKDTrainer(
        model=tiny_model(seed=1),
        teacher_model=teacher,
        args=config(
            folder,
            **{"lmbda": 0.5, "seq_kd": True, "temperature": 0.0, "teacher_top_k": 20, "max_steps": 3} | values,
        ),
        train_dataset=Dataset.from_list(tiny_rows(16)),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )


class AtStep(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()
