"""A teacher that DeepSpeed splits over two processes, whatever the student's stage: the numbers of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import SPLIT_ALL, Case
from launch import fork
from results import assert_equal, largest_differences, read

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("operators")]

PLANS: dict[str, dict[str, Any]] = {"zero2": {"stage": 2}, "zero3": {"stage": 3, **SPLIT_ALL}}
PLACE = "@plans@"  # stands for the folder of the plans' files until there is one
SMALL = 480  # 10 x the teacher's hidden size: what is larger is split up


def placed(name: str, placement: str, plan: str | None = None, **values: Any) -> Case:
    environment = {}
    if plan is not None:
        config = f"{PLACE}/{plan}.json"
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": config}
    if "refused" not in values:
        values.setdefault("engine", "ddp" if plan is None else f"zero-{PLANS[plan]['stage']}")
    args = {"max_steps": 3, "teacher_placement": placement, **values.pop("args", {})}
    return Case(name, args, environment=environment, **values)


WRITES = {"seq_kd": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
NO_TARGET = {"per_device_train_batch_size": 1, "max_new_tokens": 1, "mask_truncated_completions": True, "max_steps": 5}
HALF = placed("half", "zero3", args={"teacher_model_init_kwargs": {"dtype": "bfloat16"}})
CASES = [
    placed("ddp_zero3", "zero3"),
    placed("ddp_zero3_offload", "zero3_offload", args=WRITES),
    placed("ddp_zero3_in_memory", "zero3", in_memory=True),
    placed("ddp_zero3_no_target", "zero3_offload", args=NO_TARGET),
    placed("zero2_zero3", "zero3", "zero2", args={**WRITES, "eval_strategy": "steps", "eval_steps": 1}),
    placed("zero3_zero3_offload", "zero3_offload", "zero3", args=WRITES, engine="zero-3 partly"),
]
FOUR_BITS = {"teacher_model_init_kwargs": {"load_in_4bit": True}}
REFUSED = [
    placed("cpu_offload", "cpu_offload", "zero3", refused="cpu_offload' does not go with ZeRO-3"),
    placed("quantized", "zero3", args=FOUR_BITS, refused="does not go with a quantized teacher"),
    placed(
        "quantized_zero3", "same", "zero3", args=FOUR_BITS, refused="the teacher is quantized, which ZeRO-3 cannot"
    ),
]


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("placement")
    for name, plan in PLANS.items():
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = {**dict.fromkeys((*sizes, "gradient_clipping"), "auto"), "bf16": {"enabled": "auto"}}
        (out / f"{name}.json").write_text(json.dumps({**config, "zero_optimization": plan}))
    cases = [
        Case(**{**vars(case), "environment": {k: v.replace(PLACE, str(out)) for k, v in case.environment.items()}})
        for case in (*CASES, HALF, *REFUSED)
    ]
    # A ZeRO-3 case leaves its configuration behind for what is loaded after it in the same process.
    cases.sort(key=lambda case: "zero3.json" in str(case.environment))
    fork(cases, models, out)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_equal_one(case, folder, alone):
    result, reference = read(folder / case.name), alone(case)
    assert len(result.ranks) == 2
    print(largest_differences(result, reference))
    assert_equal(result, reference)
    assert result.facts["teacher_whole"] <= SMALL < reference.facts["teacher_whole"], "the teacher is not split up"


def test_a_teacher_in_bfloat16_is_split_up_as_it_is(folder, alone):
    """The engine takes the teacher's own dtype, not the student's; the same bf16 arithmetic, rows in other batches."""
    result, reference = read(folder / "half"), alone(HALF)
    assert result.facts["teacher_whole"] <= SMALL
    full = read(folder / "ddp_zero3").steps[0]["loss"]
    mine, theirs = (run.steps[0]["loss"] for run in (result, reference))
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert abs(mine - full) > 2 * abs(mine - theirs), "the teacher was not in bfloat16"


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_before_the_first_step(case, folder):
    assert case.refused in (folder / case.name / "refusal.txt").read_text()
