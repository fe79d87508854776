"""A teacher on the student's base, on two processes: DDP and DeepSpeed ZeRO train it as one process does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cases import KINDS, SEVERAL, Case
from launch import fork
from results import assert_all_saved_whole, assert_as_one_process, read

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("operators")]

ALL_BRANCHES: dict[str, Any] = {"gradient_accumulation_steps": 2, "seq_kd": True, "gradient_checkpointing": True}
# Of a model and itself the divergence is small, and Adam would make steps of the rounding of small gradients.
SGD: dict[str, Any] = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.3}
ZERO_3 = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
CASES = [
    Case(f"{engine}_{shares}", {**ALL_BRANCHES, **args}, engine=engine, shares=shares, resume=resume)
    for engine, shares, args, resume in (
        ("ddp", "itself", {}, None),
        ("ddp", "several", {"max_steps": 4}, 2),
        ("zero-2", "math", {}, None),
        ("zero-2", "several", {}, None),
        ("zero-3", "itself", {"gradient_checkpointing": False}, None),
        ("zero-3", "math", {"max_steps": 4}, 2),
        ("zero-3", "several", {"per_device_train_batch_size": 1}, None),
        ("ddp", "kinds", {"per_device_train_batch_size": 1, "max_steps": 4}, 2),
        ("zero-2", "kinds", {"per_device_train_batch_size": 1}, None),
        ("zero-3", "kinds", {"per_device_train_batch_size": 1}, None),
    )
]
CASES += [
    Case(
        f"{engine}_{shares}{'' if lora else '_all_weights'}",
        {**ALL_BRANCHES, **args},
        engine=engine,
        lora=lora,
        shares=shares,
        resume=resume,
    )
    for engine, shares, lora, args, resume in (
        ("ddp", "ema", True, {"max_steps": 4}, 2),
        ("ddp", "live", False, SGD, None),
        ("zero-2", "live", False, SGD, None),
        ("zero-2", "ema", True, {"max_steps": 3}, None),
        ("zero-3", "ema", True, {"max_steps": 4, "gradient_checkpointing": False}, 2),
        ("zero-3", "live", False, {**SGD, "gradient_checkpointing": False}, None),
        ("zero-3", "live", True, {"max_steps": 3}, None),
    )
]


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared")
    for stage, plan in ((2, {}), (3, ZERO_3)):
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = dict.fromkeys((*sizes, "gradient_clipping"), "auto")
        (out / f"zero-{stage}.json").write_text(json.dumps({**config, "zero_optimization": {"stage": stage, **plan}}))
    zero = {"ACCELERATE_USE_DEEPSPEED": "true"}
    placed = [
        case
        if case.engine == "ddp"
        else dataclasses.replace(
            case, environment={**zero, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(out / f"{case.engine}.json")}
        )
        for case in CASES
    ]
    placed.sort(key=lambda case: case.engine)  # ZeRO-3 last: what transformers remembers of it outlives its case
    fork(placed, models, out)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_equal_one(case, folder, alone):
    assert_as_one_process(case, folder, alone)
    assert_any_rank_lacks_a_teacher(case, folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_saved(case, folder, models):
    assert_all_saved_whole(case, folder, models)


def assert_any_rank_lacks_a_teacher(case: Case, folder: Path) -> None:
    """With several teachers some rank has no row of one that the other has: there a collective could hang."""
    if case.shares not in ("several", "kinds"):
        return
    names = SEVERAL if case.shares == "several" else KINDS
    ranks = read(folder / case.name).ranks
    whose = [[{names[s[0] % len(names)] for s in step} for step in rank] for rank in ranks]
    assert any(a != b for a, b in zip(*whose, strict=True))
