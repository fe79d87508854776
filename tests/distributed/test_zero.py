"""DeepSpeed ZeRO, the real engine on two processes: the same numbers as one process, no hang, nothing saved empty.

ZeRO-3 runs with threshold 0, so that every parameter is really split up, and TORCH_DISTRIBUTED_DEBUG=DETAIL turns
ranks that take different ways into an error at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from cases import ALIGNED, SPLIT_ALL, VIEWS, Case
from launch import fork
from results import assert_all_saved_whole, assert_as_dense, assert_as_one_process, read

from gkd.assembly.checks import check_not_quantized

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("operators")]

ON_CPU = {"offload_optimizer": {"device": "cpu"}}
PLANS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, **SPLIT_ALL},
    "zero3_persistent": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "zero2_offload": {"stage": 2, **ON_CPU},
    "zero3_offload": {"stage": 3, **SPLIT_ALL, **ON_CPU, "offload_param": {"device": "cpu"}},
    "zero3_unsaveable": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
PLACE = "@plans@"  # stands for the folder of the plans' files until there is one


def zero(name: str, plan: str, **values: Any) -> Case:
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"{PLACE}/{plan}.json"}
    values.setdefault("engine", f"zero-{PLANS[plan]['stage']}")
    return Case(name, environment=environment, **values)


ALL_BRANCHES = {
    "gradient_accumulation_steps": 2,
    "seq_kd": True,
    "gradient_checkpointing": True,
    "max_steps": 6,
}
NO_TARGET = {"per_device_train_batch_size": 1, "max_new_tokens": 1, "mask_truncated_completions": True}
FULL: dict[str, Any] = {"args": {"learning_rate": 1e-3}, "lora": False}
CASES = [
    zero("zero1", "zero1"),
    zero("zero2", "zero2"),
    zero("zero2_branches", "zero2", args=ALL_BRANCHES),
    zero("zero2_full", "zero2", **FULL),
    zero("zero2_tied", "zero2", **FULL, student="tied"),
    zero("zero2_resumed", "zero2", args={"max_steps": 6}, resume=3),
    zero("zero2_offload", "zero2_offload"),
    zero("zero3", "zero3"),
    zero("zero3_branches", "zero3", args=ALL_BRANCHES),
    zero("zero3_evaluated", "zero3", args={"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}),
    zero("zero3_no_target", "zero3", args=NO_TARGET),
    zero("zero3_uneven", "zero3", args={"per_device_train_batch_size": 5, "max_steps": 4}),
    zero("zero3_disturbed", "zero3", disturb=True),
    zero("zero3_in_memory", "zero3", in_memory=True),
    zero("zero3_persistent", "zero3_persistent", engine="zero-3 partly"),
    zero("zero3_full", "zero3", **FULL),
    zero("zero3_tied", "zero3", **FULL, student="tied"),
    zero("zero3_resumed", "zero3", args={"max_steps": 6, "gradient_checkpointing": True}, resume=3),
    zero("zero3_full_resumed", "zero3", args={"max_steps": 6, "learning_rate": 1e-3}, lora=False, resume=3),
    zero("zero3_offload", "zero3_offload"),
    zero("zero3_views", "zero3", args=VIEWS, lora=False, views=True),
    zero("zero2_aligned", "zero2", args=ALIGNED, aligned=True),
    zero("zero3_aligned", "zero3", args=ALIGNED, aligned=True),
    Case("zero2_argument", {"deepspeed": f"{PLACE}/zero2.json"}, engine="zero-2"),
    Case("zero3_argument", {"deepspeed": f"{PLACE}/zero3.json"}, engine="zero-3"),
]
HALF = [zero("zero2_bf16", "zero2", args={"bf16": True}), zero("zero3_bf16", "zero3", args={"bf16": True})]
REFUSED = [zero("zero3_unsaveable", "zero3_unsaveable", refused="stage3_gather_16bit_weights_on_model_save")]


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero")
    for name, plan in PLANS.items():
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = {**dict.fromkeys((*sizes, "gradient_clipping"), "auto"), "bf16": {"enabled": "auto"}}
        (out / f"{name}.json").write_text(json.dumps({**config, "zero_optimization": plan}))

    def placed(values: dict[str, Any]) -> dict[str, Any]:
        return {key: v.replace(PLACE, str(out)) if isinstance(v, str) else v for key, v in values.items()}

    cases = [
        Case(**{**vars(case), "args": placed(case.args), "environment": placed(case.environment)})
        for case in (*CASES, *HALF, *REFUSED)
    ]
    # the cases choose the engine by their environment
    fork(cases, models, out, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_equal_one(case, folder, alone):
    assert_as_one_process(case, folder, alone)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_saved(case, folder, models):
    assert_all_saved_whole(case, folder, models)


def test_a_teacher_with_prompts_of_its_own_is_that_of_two_dense_passes(folder, models):
    assert_as_dense(read(folder / "zero3_views"), models)


def test_checkpointing_is_reentrant_for_lora_under_zero_3_only(folder):
    """R50: non-reentrant checkpointing recomputes with frozen parameters that ZeRO-3 has released."""
    assert read(folder / "zero3_branches").facts["use_reentrant"] is True
    assert not read(folder / "zero2_branches").facts["use_reentrant"]


def test_the_cases_hold_what_they_are_there_for(folder):
    branches = read(folder / "zero3_branches")
    assert {s[1] for rank in branches.ranks for step in rank for s in step} == {"student", "teacher"}
    assert len({len(s[2]) for rank in branches.ranks for step in rank for s in step}) > 5, "rows of one length"
    rows = [[sum(s[1] == "student" for s in step) for step in rank] for rank in read(folder / "zero3").ranks]
    assert any(a != b for a, b in zip(*rows, strict=True)), "ranks have different numbers of rows to write"
    assert any(a == 0 < b or b == 0 < a for a, b in zip(*rows, strict=True)), "a rank has nothing to write"
    without = [[sum(s[3] for s in step) for step in rank] for rank in read(folder / "zero3_no_target").ranks]
    assert any(a == 0 < b or b == 0 < a for a, b in zip(*without, strict=True)), "a rank has nothing to train on"


def test_evaluation_inside_training(folder, alone):
    case = next(case for case in CASES if case.name == "zero3_evaluated")
    logs, reference = (
        [line for line in result.facts["logs"] if "eval_loss" in line]
        for result in (read(folder / case.name), alone(case))
    )
    assert len(logs) == len(reference) == 2
    for mine, theirs in zip(logs, reference, strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_bf16(case, folder, alone):
    """The same rows; the loss of the first step, before the weights part ways, is fp32's up to bf16's 8 bits."""
    result, reference = read(folder / case.name), alone(CASES[0])
    assert [sorted(s[0] for s in step) for step in result.windows] == [
        sorted(s[0] for s in step) for step in reference.windows
    ]
    assert result.steps[0]["loss"] == pytest.approx(reference.steps[0]["loss"], rel=0.05)
    for step in result.steps:
        assert 0 < step["loss"] < 1
        assert 0 < step["grad_norm"] < 1
    assert all(weight.isfinite().all() and weight.numel() for weight in result.weights.values())


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_before_the_first_step(case, folder):
    assert case.refused in (folder / case.name / "refusal.txt").read_text()


def test_quantized_models_are_refused_under_zero_3():
    model = torch.nn.Linear(1, 1)
    plugin = SimpleNamespace(zero_stage=3)
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin), distributed_type=DistributedType.DEEPSPEED
    )
    check_not_quantized(model, "teacher", accelerator)
    model.is_quantized = True
    with pytest.raises(ValueError, match="the teacher is quantized"):
        check_not_quantized(model, "teacher", accelerator)
    plugin.zero_stage = 2
    check_not_quantized(model, "teacher", accelerator)
