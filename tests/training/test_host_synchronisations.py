"""Where the CPU would wait for an accelerator: counted on the CPU, by the operations that make it wait."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hf_rollouts import rollout_of
from peft import LoraConfig
from served import trainer_with
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from training import trainer_of
from vllm_server.fake import FakeServer

import gkd
from gkd.data.sequences import collate, join, unpad
from gkd.data.targets import Targets, find_targets, targets_of
from gkd.teachers.routed import _Rows
from gkd.training.metrics import Meter

PACKAGE = str(Path(gkd.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")


class Waits(TorchDispatchMode):
    """Records (operation, innermost file outside torch) of what needs a value, or a size, from the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name in WAITS or (name in ("index", "index_put", "index_put_") and _by_mask(args[1])):
            self.note(name)
        return operation(*args, **(kwargs or {}))

    def note(self, name):
        frame = sys._getframe(2)
        while frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.seen.append((name, frame.f_code.co_filename, frame.f_lineno))

    @property
    def own(self):
        return [wait for wait in self.seen if wait[1].startswith(PACKAGE)]


def _by_mask(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)


def waits_of_training_steps(tmp_path, monkeypatch, rows=16, vocab=259, **values):
    """What makes the CPU wait from the first line of each `training_step` to its last, and the steps' number."""
    trainer = trainer_of(
        tmp_path,
        Dataset.from_list(tiny_rows(rows)),
        student=tiny_model(seed=1, vocab=vocab),
        teacher=tiny_model(seed=2, vocab=vocab),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        gradient_accumulation_steps=2,
        max_new_tokens=4,
        **values,
    )
    return watched_training(trainer, monkeypatch)


def count_transfers(waits, monkeypatch, inside):
    """Note what becomes Python's, or numpy's, while `inside` says so."""
    for name in ("tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def noted(self, *args, _name=name, _original=original, **kwargs):
            if inside():
                waits.note(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noted)


def watched_training(trainer, monkeypatch):
    waits, steps, step = Waits(), [], trainer.training_step
    count_transfers(waits, monkeypatch, lambda: steps and steps[-1] == "inside")

    def watched(*args, **kwargs):
        steps.append("inside")
        with waits:
            loss = step(*args, **kwargs)
        steps[-1] = "done"
        return loss

    trainer.training_step = watched
    trainer.train()
    return waits, len(steps)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ce_weight": 0.5, "loss_reduction": "sequence"},
        {"seq_kd": True, "seq_kd_loss": "nll"},
        {"divergence": "adaptive_kl"},
        {"teacher_top_k": 8},
        {"collapse_guard": "warn", "token_weights": "iw_opd", "log_top_k_overlap": 4},
        {"lmbda": 1.0, "num_completions": 2, "rollout_every": 2},
    ],
)
def test_no_line_of_ours_waits_in_a_training_step(tmp_path, monkeypatch, values):
    waits, steps = waits_of_training_steps(tmp_path, monkeypatch, **values)
    assert steps == 2
    assert waits.own == []


def test_waits_do_not_grow_with_rows_chunks_or_vocabulary(tmp_path, monkeypatch):
    """Those of the libraries: as many in each step, whatever its size."""
    counts = []
    for number, values in enumerate(
        ({}, {"per_device_train_batch_size": 8}, {"loss_chunk_size": 3}, {"vocab": 400, "max_length": 300})
    ):
        with monkeypatch.context() as patch:
            waits, steps = waits_of_training_steps(tmp_path / str(number), patch, **values)
        counts.append(len(waits.seen) / steps)
    assert counts == [counts[0]] * 4


def test_a_server_s_rollouts_are_compared_with_as_many_waits_whatever_their_number(tmp_path, monkeypatch):
    counts = []
    for rows in (2, 8):
        urls = {"rollout_backend": "vllm", "lmbda": 1.0, "seq_kd": False, "teacher_top_k": None, "max_steps": 1}
        with (
            FakeServer(tiny_model(seed=1), tiny_tokenizer(), max_model_len=300) as server,
            monkeypatch.context() as patch,
        ):
            values = urls | {"rollout_server_url": server.url, "per_device_train_batch_size": rows}
            trainer = trainer_with(tmp_path / str(rows), tiny_model(seed=2), max_new_tokens=12, **values)
            waits, _ = watched_training(trainer, patch)
        counts.append([name for name, _, _ in waits.own])
    assert counts[0] == counts[1]
    assert set(counts[0]) <= {"nonzero", "cpu", "tolist"}


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_rollout_waits_once_for_each_token_and_for_no_row(kind, monkeypatch):
    """The tokens of all rows come over together. A mask over padded rows makes transformers look once more at each
    token, when nothing is under way."""
    counts = []
    for prompts in ([[5], [9] * 11, [3, 4]], [[row, *range(row)] for row in range(1, 24)]):
        waits = Waits()
        rollout = rollout_of(tiny_model(kind, seed=3), max_new_tokens=10, top_p=0.9, stop_ids=(258, *range(9)))
        with monkeypatch.context() as patch, waits:
            count_transfers(waits, patch, lambda: True)
            found = rollout.generate(prompts, 0)
        assert [name for name, _, _ in waits.own] == ["tolist"] * max(map(len, found))
        counts.append(len(waits.seen) - len(waits.own) * (2 if kind == "qwen2" else 1))
    assert counts[0] == counts[1] <= 6, "at the beginning"


def test_a_batch_is_taken_apart_with_one_transfer_of_each_tensor(monkeypatch):
    transfers, original = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(1) or original(self))
    counts = []
    for rows in (2, 9):
        batch = collate([join([1, 2], [3] * n, "data", n) for n in range(1, rows + 1)], 0)
        transfers.clear()
        assert len(unpad(batch)) == rows
        counts.append(len(transfers))
    assert counts[0] == counts[1] == 5  # ids, mask, labels, rows, teachers: not the targets


def test_the_targets_of_some_rows_are_those_of_their_labels():
    """What several teachers are asked, without looking at the labels on the device."""
    lengths = ((3, 2), (1, 4), (2, 1), (5, 3))
    batch = collate([join([7] * p, list(range(c)), "data", 0) for p, c in lengths], 0)
    batch["teachers"] = torch.tensor([1, 0, 1, 0])
    part = _Rows(batch).part(0)
    expected, found = find_targets(part["labels"]), targets_of(part)
    assert part["input_ids"].shape == (2, 8)
    for name in vars(Targets(*[torch.empty(0)] * 4)):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name


def test_a_phase_inside_another_is_its_own(monkeypatch):
    """Time as the device tells it: marks are set, and read when something is logged."""
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 25.0])
    monkeypatch.setattr("gkd.training.metrics._mark", lambda device: next(now))
    meter = Meter()
    with meter.phase("student"), meter.phase("teacher"):
        pass
    with meter.phase("rollout"):
        pass
    logs = meter.flush(lambda x: x, lambda x: x)
    assert {name: logs[f"time/{name}"] for name in ("student", "teacher", "rollout")} == {
        "student": 7.0,
        "teacher": 3.0,
        "rollout": 5.0,
    }


def test_marks_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("gkd.training.metrics._MANY_SPANS", 10)
    now = iter(range(1000))
    monkeypatch.setattr("gkd.training.metrics._mark", lambda device: float(next(now)))
    meter = Meter()
    for _ in range(100):
        with meter.phase("rollout"):
            assert len(meter._spans) <= 10
    assert meter.flush(lambda x: x, lambda x: x)["time/rollout"] == 100.0
