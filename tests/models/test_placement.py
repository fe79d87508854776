"""`teacher_placement`: weights that come to the accelerator for the time of their work only, and what is refused.

There is no accelerator here. What stands in for one is the transfer alone: a copy in other memory, which can be told
from the weights at home by its address and is gone when nobody holds it. All else is the real thing, and the sharded
placements run in tests/distributed.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import save_tiny, tiny_model
from training import change, losses, trainer_of

from gkd.models.generation_mode import generation_mode
from gkd.models.head import output_layer
from gkd.models.loading import load_teacher
from gkd.models.placement import check_placement, offload, on_accelerator, place_teacher, zero3_config
from gkd.teachers.local import LocalTeacher


class Transfer:
    """Copies to "the accelerator", and which of them are still held."""

    def __init__(self) -> None:
        self.copies: list[weakref.ref[Any]] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self.copies.append(weakref.ref(copy.untyped_storage()))
        return copy

    @property
    def held(self) -> int:
        return sum(copy() is not None for copy in self.copies)


def addresses(model: Any) -> dict[str, int]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.data_ptr() for name, tensor in tensors}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_and_go_and_the_head_stays(tied):
    model = tiny_model(tie_word_embeddings=tied)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    transfer = Transfer()
    offload(model, torch.device("cpu"), transfer)
    head = {name for name, p in model.named_parameters() if p is output_layer(model).weight}
    home, moved = addresses(model), len(transfer.copies)
    assert moved == 1, "only the head is on the accelerator"
    with on_accelerator(model):
        there = addresses(model)
        assert {name for name in home if home[name] == there[name]} == head
        assert model.device == model.model.embed_tokens.weight.device
        with on_accelerator(model):  # a rollout within a phase that scores, say
            assert addresses(model) == there
        assert addresses(model) == there, "the inner one sent them away"
    assert addresses(model) == home
    with pytest.raises(KeyError), on_accelerator(model):
        raise KeyError
    assert addresses(model) == home
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_scoring_and_writing_bring_the_weights_and_let_go_of_them():
    plain, model, transfer = tiny_model(seed=2), tiny_model(seed=2), Transfer()
    accelerator = Accelerator(cpu=True)
    teacher = LocalTeacher(model, accelerator)
    offload(model, torch.device("cpu"), transfer)
    standing = transfer.held
    batch = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].clone()
    before = len(transfer.copies)
    signal: Any = teacher.score(batch)
    assert len(transfer.copies) > before, "the weights did not come"
    assert transfer.held == standing == 1, "weights are still there after scoring"
    expected: Any = LocalTeacher(plain, accelerator).score(batch)
    assert torch.equal(signal.hidden, expected.hidden)
    before = len(transfer.copies)
    with generation_mode(model, accelerator) as bare:
        assert transfer.held > standing
        bare(input_ids=batch["input_ids"])
    assert len(transfer.copies) > before
    assert transfer.held == standing, "weights are still there after writing"


@pytest.mark.parametrize("source", [{"lmbda": 0.5}, {"lmbda": 0.5, "seq_kd": True}], ids=["data", "seq_kd"])
def test_the_same_training(source, tmp_path, monkeypatch):
    """A whole run with weights that come and go (for each micro-batch, and to write) equals one where they stay."""
    transfer = Transfer()
    monkeypatch.setattr(
        "gkd.models.placement.offload",
        lambda model, device, real=offload, **how: real(model, torch.device("cpu"), transfer, **how),
    )
    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "teacher_cache_dir": "off", **source}
    plain = trainer_of(tmp_path / "a", **args)
    moved = trainer_of(tmp_path / "b", teacher_placement="cpu_offload", **args)
    assert transfer.held == 1
    once, before = len(list(moved.teacher_model.parameters())), len(transfer.copies)
    torch.testing.assert_close(change(moved), change(plain), rtol=0, atol=0)
    journeys = (len(transfer.copies) - before) / once
    assert journeys < (2.5 if "seq_kd" in source else 1.5)  # to score both micro-batches at once, and to write
    assert losses(moved) == losses(plain)
    assert transfer.held == 1
    assert not any(p.requires_grad for p in moved.teacher_model.parameters())


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (("cpu_offload", 2, True), "cpu_offload' does not go with ZeRO-3"),
        (("zero3", 1, False), "one process to split the teacher over"),
        (("zero3_offload", 1, False), "one process to split the teacher over"),
    ],
)
def test_launches_that_cannot_honour_it(launch, words):
    with pytest.raises(ValueError, match=words):
        check_placement(*launch)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teacher_placement": "gpu"}, "teacher_placement='gpu' is unknown"),
        (
            {"teacher_placement": "cpu_offload", "teacher_server_url": "http://x:1", "teacher_top_k": 8},
            "has no effect with teacher_server_url",
        ),
        ({"teacher_placement": "zero3"}, "one process"),
    ],
)
def test_refused_before_anything_is_loaded(values, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, teacher="no/such-model", **values)


def test_a_device_map_has_placed_the_teacher(tmp_path):
    path = save_tiny(tmp_path)
    with pytest.raises(ValueError, match="take device_map out of"):
        load_teacher(path, {"device_map": "cpu"}, placement="cpu_offload")
    model = load_teacher(path, {"device_map": {"": "cpu"}})
    model.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match="take device_map out of"):
        place_teacher(model, Accelerator(cpu=True), "cpu_offload")


def test_no_deepspeed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install deepspeed"):
        check_placement("zero3", 2, False)


def test_the_engines_configuration():
    """Of the teacher's own dtype, without an optimizer; what is small stays whole."""
    config = zero3_config(torch.bfloat16, 64, "zero3_offload")
    assert config["bf16"] == {"enabled": True}
    assert config["fp16"] == {"enabled": False}
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "offload_param" not in zero3_config(torch.float32, 64, "zero3")["zero_optimization"]
    assert not {"optimizer", "scheduler"} & set(config)
