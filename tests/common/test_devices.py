"""Devices without float64 (Apple's GPUs): no such tensor is made there, and the numbers hold in float32."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import tiny_rows
from torch.utils._python_dispatch import TorchDispatchMode
from training import logged, losses, trainer_of

from gkd.common import devices
from gkd.common.devices import sum_dtype
from gkd.common.ranks import max_over_ranks, sum_over_ranks
from gkd.loss.settings import FusedOutput
from gkd.rollouts import hf
from gkd.training.metrics import TEACHER_METRICS, TOKEN_METRICS, Meter
from gkd.training.position_profile import PositionProfile


class NoFloat64(TorchDispatchMode):
    """What a device without float64 does, on the meta device: any tensor of that dtype is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta" and tensor.dtype == torch.float64:
                raise TypeError("Cannot convert a tensor to float64 on this device")
        return out


@pytest.fixture
def refused(monkeypatch):
    monkeypatch.setattr(devices, "NO_FLOAT64", {"meta", "mps"})
    with NoFloat64():
        yield


def arrives(values):
    """A collective of that device: what comes of it lies on the CPU, for there is nothing in a meta tensor."""
    assert values.device.type == "meta"
    return torch.zeros(values.shape, dtype=values.dtype)


def test_no_float64_tensor_is_made(refused):
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(2, dtype=torch.float64, device="meta")
    names = {attribute for _, attribute in (*TOKEN_METRICS, *TEACHER_METRICS)} & {f.name for f in fields(FusedOutput)}
    kinds, border = (torch.ones(5, dtype=dtype, device="meta") for dtype in (torch.int8, torch.bool))
    values = {name: torch.ones(5, device="meta") for name in names}
    output = FusedOutput(loss=None, kinds=kinds, at_border=border, **values)
    ids = torch.zeros(5, dtype=torch.long, device="meta")
    meter = Meter("meta", ("one", "two"))
    meter.add_targets(output, ids, ids)
    meter.flush(arrives, arrives)
    profile = PositionProfile("meta")
    profile.add(output.divergence, ids, ids + 1, 0, 3)
    profile.flush(arrives)
    accelerator = SimpleNamespace(
        device=torch.device("meta"), reduce=lambda values, **_: values, gather=lambda values: values
    )
    sums = torch.ones(3, dtype=torch.float64)
    assert sum_over_ranks(accelerator, sums).dtype == torch.float32
    assert max_over_ranks(accelerator, sums).dtype == torch.float32
    assert sum_over_ranks(accelerator, torch.ones(3, dtype=torch.long)).dtype == torch.long


def test_which_devices_have_it():
    assert sum_dtype("cpu") == sum_dtype(torch.device("cuda:1")) == torch.float64
    assert sum_dtype("mps") == torch.float32


def test_a_training_in_float32_sums_logs_the_same_numbers(tmp_path, monkeypatch):
    rows = Dataset.from_list(tiny_rows(8))
    common = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "lmbda": 0.5}
    runs = []
    for missing in (set(), {"cpu"}):
        monkeypatch.setattr(devices, "NO_FLOAT64", missing)
        trainer = trainer_of(tmp_path, rows, **common)
        gather, seen = trainer.accelerator.gather_for_metrics, []
        trainer.accelerator.gather_for_metrics = lambda values, *a, g=gather, s=seen: s.append(values) or g(values, *a)
        trainer.train()
        assert {values.dtype for values in seen if values.dim() == 2} == {sum_dtype("cpu")}
        runs.append(trainer)
    assert hf.sum_dtype("cpu") == torch.float32
    assert losses(runs[0]) == losses(runs[1])  # the same completions were sampled
    for name in ("eval_loss", "student/entropy", "teacher/log_prob"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-5)
