"""The contract of a teacher: whatever its kind, its signal gives the loss and gradient that the plain local teacher
gives on the same batch, for every divergence. A new kind joins with one line in KINDS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import config
from transformers import AutoModelForCausalLM
from vllm_server.fake import FakeServer

from gkd import GKDTrainer
from gkd.batch import collate, target_mask, unpad
from gkd.divergence import DIVERGENCES, make_divergence
from gkd.fused import LossSettings, fused_divergence
from gkd.signals import Head
from gkd.teachers import LocalTeacher

MODEL: dict[str, Any] = {"hidden": 64, "layers": 2, "seed": 1}
TOP_K = 12


@dataclass(frozen=True)
class Kind:
    """Attributes:
    fields: of GKDConfig, from the folders and addresses of `places`; `teacher_model` is a trainer's argument.
    bound: largest relative difference of loss and gradient. None: exact, 1e-5.
    top_k: K, where the signal says no more.
    """

    fields: Callable[[Any], dict[str, Any]]
    bound: float | None = None
    top_k: int | None = None


KINDS = {
    "by name": Kind(lambda at: {"teacher_model_name_or_path": at.teacher}),
    "as a model": Kind(lambda at: {"teacher_model": AutoModelForCausalLM.from_pretrained(at.teacher)}),
    "adapter": Kind(lambda at: {"teacher_model_name_or_path": at.base, "teacher_adapter_name_or_path": at.adapter}),
    "student's base": Kind(lambda at: {"share_base_model": True, "teacher_adapter_name_or_path": at.adapter}),
    "several": Kind(lambda at: {"share_base_model": True, "teacher_adapters": {"a": at.adapter, "b": at.adapter}}),
    "CPU memory": Kind(lambda at: {"teacher_model_name_or_path": at.teacher, "teacher_placement": "cpu_offload"}),
    "cached": Kind(lambda at: {"teacher_model_name_or_path": at.teacher, "teacher_scores_dir": at.scores}),
    "server": Kind(lambda at: {"teacher_server_url": at.server, "teacher_top_k": TOP_K}, bound=1e-4, top_k=TOP_K),
    "8 bits": Kind(
        lambda at: {"teacher_model_name_or_path": at.teacher, "teacher_model_init_kwargs": {"load_in_8bit": True}},
        bound=0.1,
    ),
    "4 bits": Kind(
        lambda at: {"teacher_model_name_or_path": at.teacher, "teacher_model_init_kwargs": {"load_in_4bit": True}},
        bound=0.5,
    ),
}


@dataclass(frozen=True)
class Places:
    """Folders of a base, of an adapter on it, of both merged (the teacher), of a cache; and a server's url."""

    base: str
    adapter: str
    teacher: str
    scores: str
    server: str


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder: Path = tmp_path_factory.mktemp("teachers")
    base = save_tiny(folder / "base", **MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned = get_peft_model(tiny_model(**MODEL), LoraConfig(r=4, target_modules="all-linear"))
        for parameter in (p for name, p in tuned.named_parameters() if "lora_B" in name):
            parameter.data.normal_(std=0.1)
    tuned.save_pretrained(folder / "adapter")
    merged = tuned.merge_and_unload()
    merged.save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    with FakeServer(merged, tiny_tokenizer(), max_model_len=400) as server:
        yield Places(base, str(folder / "adapter"), str(folder / "teacher"), str(folder / "scores"), server.url)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_list([{**row, "teacher": "ab"[i % 2]} for i, row in enumerate(tiny_rows(6))])


def signal_of(kind: Kind, places: Places, rows: Dataset, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The teacher's second signal on a batch of all rows (a cache has the first by then), and the batch."""
    if kind.bound is not None and kind.top_k is None:
        pytest.importorskip("bitsandbytes")
    fields = kind.fields(places)
    trainer = GKDTrainer(
        places.base,
        fields.pop("teacher_model", None),
        config(folder, lmbda=0.0, **fields),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    features = [trainer.train_dataset[i] for i in range(len(rows))]
    batch = collate(unpad(trainer.data_collator(features)), pad_id=256)
    trainer.teacher.score(batch)
    return trainer.teacher.score(batch), batch


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_loss_and_gradient_are_those_of_the_local_teacher(kind, places, rows, tmp_path):
    signal, batch = signal_of(kind, places, rows, tmp_path)
    reference = LocalTeacher(AutoModelForCausalLM.from_pretrained(places.teacher), Accelerator(cpu=True))
    plain = reference.score(batch)
    targets = batch["labels"][:, 1:][target_mask(batch["labels"])]
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(len(targets), 32, generator=draw)
    head = Head(torch.randn(259, 32, generator=draw) / 4)
    weights = torch.rand(len(targets), generator=draw)
    for name in DIVERGENCES:
        settings = LossSettings(make_divergence(name), teacher_top_k=kind.top_k)
        found, expected = (_pass(hidden, head, said, targets, weights, settings) for said in (signal, plain))
        assert expected[0] > 0.01
        bound = kind.bound or 1e-5
        assert found[0] == pytest.approx(expected[0], rel=bound), name
        if name != "total_variation" or bound < 1e-2:  # its gradient jumps where the two probabilities cross
            difference = (found[1] - expected[1]).norm() / expected[1].norm()
            assert difference < bound, name


def _pass(
    hidden: torch.Tensor,
    head: Head,
    signal: Any,
    targets: torch.Tensor,
    weights: torch.Tensor,
    settings: LossSettings,
) -> tuple[float, torch.Tensor]:
    """Loss, and its gradient with respect to the student's hidden states."""
    leaf = hidden.clone().requires_grad_()
    loss = fused_divergence(leaf, head, signal, targets, weights, settings).loss
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad
