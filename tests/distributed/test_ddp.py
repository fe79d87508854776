"""Two processes with DDP train as one process does (law 1), whatever the ranks' own random streams hold."""

from __future__ import annotations

import dataclasses

import pytest
from accelerate import Accelerator
from cases import ALIGNED, VIEWS, Case, run
from launch import fork
from results import assert_all_saved_whole, assert_as_dense, assert_as_one_process, read

from gkd.assembly.launch_checks import check_wiring

pytestmark = pytest.mark.distributed

MIXED = Case("mixed", engine="ddp")
CASES = [
    MIXED,
    Case("accumulated", {"gradient_accumulation_steps": 2, "seq_kd": True, "eval_strategy": "steps"}, engine="ddp"),
    Case(
        "few_rollouts",
        {
            "gradient_accumulation_steps": 4,
            "per_device_train_batch_size": 1,
            "lmbda": 0.25,
            "seq_kd": True,
            "loss_reduction": "sequence",
        },
        engine="ddp",
    ),
    Case(
        "rank_without_target",
        {"per_device_train_batch_size": 1, "max_new_tokens": 1, "mask_truncated_completions": True},
        engine="ddp",
    ),
    Case("one_prompt", {"lmbda": 1.0, "max_steps": 2}, engine="ddp", one_row=True),
    Case("disturbed", engine="ddp", disturb=True),
    Case("clipped", {"max_grad_norm": 0.01, "optim": "sgd", "learning_rate": 3.0}, engine="ddp"),
    Case("full", {"learning_rate": 1e-3}, engine="ddp", lora=False),
    Case("tied", {"learning_rate": 1e-3}, engine="ddp", lora=False, student="tied"),
    Case("with_vision", {"max_steps": 3, "gradient_checkpointing": True}, engine="ddp", lora=False, student="vision"),
    Case("uneven", {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "max_steps": 4}, engine="ddp"),
    Case("uneven_resumed", {"per_device_train_batch_size": 5}, engine="ddp", resume=1),
    Case(
        "scheduled",
        {"lmbda": "0@0 1@4", "max_new_tokens": "3@0 8@4", "temperature": "1@0 0.5@4", "beta": "0.1@0 0.9@4 cosine"},
        engine="ddp",
        resume=2,
    ),
    Case(
        "guarded",
        {
            "per_device_train_batch_size": 8,
            "lmbda": 1.0,
            "collapse_guard": "lower_lmbda",
            "collapse_window": 1,
            "collapse_threshold": 0.01,
        },
        engine="ddp",
    ),
    Case(
        "rolled_back",
        {
            "per_device_train_batch_size": 8,
            "lmbda": 1.0,
            "collapse_guard": "rollback",
            "collapse_window": 1,
            "collapse_threshold": 0.01,
            "save_strategy": "steps",
            "save_steps": 1,
        },
        engine="ddp",
    ),
    Case("views", VIEWS, engine="ddp", lora=False, views=True),
    Case("aligned", ALIGNED, engine="ddp", aligned=True),
    Case(
        "rewarded",
        {"reward_weight": 0.3, "divergence_student": "reverse_kl", "skip_first_tokens": 1, "lmbda": 0.75},
        engine="ddp",
        rewarded=True,
    ),
    Case("grouped", {"rollout_every": 3, "seq_kd": True, "per_device_train_batch_size": 5}, engine="ddp", resume=1),
    Case("grouped_late", {"rollout_every": 3, "gradient_accumulation_steps": 2}, engine="ddp", resume=2),
    Case(
        "several_completions",
        {"num_completions": 2, "lmbda": 1.0, "rollout_every": 2, "gradient_accumulation_steps": 2},
        engine="ddp",
        resume=1,
    ),
    Case("resumed", {"max_steps": 6, "gradient_checkpointing": True}, engine="ddp", resume=3),
]
REFUSED = [
    Case("fsdp", environment={"ACCELERATE_USE_FSDP": "true"}, refused="FSDP is not supported"),
    Case("fsdp_argument", {"fsdp": "full_shard"}, refused="FSDP is not supported"),
    Case(
        "dropped_deepspeed",
        environment={"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"},
        refused="ACCELERATE_USE_CPU",
    ),
]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    # TORCH_DISTRIBUTED_DEBUG=DETAIL crashes DDP itself (torch 2.13), so it is left to the ZeRO cases.
    fork([*CASES, *REFUSED], models, out)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_equal_one(case, folder, alone):
    assert_as_one_process(case, folder, alone)


@pytest.mark.parametrize("name", ["guarded", "rolled_back"])
def test_the_guard_acts_on_two_processes(name, folder):
    assert read(folder / name).steps[-1]["guard/events"] >= 1


def test_a_teacher_with_prompts_of_its_own_is_that_of_two_dense_passes(folder, models):
    assert_as_dense(read(folder / "views"), models)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_saved(case, folder, models):
    assert_all_saved_whole(case, folder, models)


def test_the_cases_hold_what_they_are_there_for(folder):
    """Rows of a rank by source and targets, step by step: the special situations did occur."""
    few = read(folder / "few_rollouts").ranks
    students = [[sum(s[1] == "student" for s in step) for step in rank] for rank in few]
    assert any(a == 0 < b or b == 0 < a for a, b in zip(*students, strict=True))
    assert {s[1] for rank in few for step in rank for s in step} == {"student", "teacher"}
    without = [[sum(s[3] for s in step) for step in rank] for rank in read(folder / "rank_without_target").ranks]
    assert any(a == 0 < b or b == 0 < a for a, b in zip(*without, strict=True))
    rows = [[len(step) for step in rank] for rank in read(folder / "uneven").ranks]
    assert rows == [[10, 4, 10, 4], [10, 0, 10, 0]], "24 rows: an epoch ends with 4, all of them on one rank"
    lengths = [len(s[2]) for rank in read(folder / "mixed").ranks for step in rank for s in step]
    assert len(set(lengths)) > 5
    assert max(line["grad_norm"] for line in read(folder / "clipped").steps) > 0.01


def test_ranks_sample_differently(folder):
    """R44: the same prompt on two ranks gets other completions, although all draws hang on one seed."""
    ranks = read(folder / "one_prompt").ranks
    for step in zip(*ranks, strict=True):
        completions = [str(ids) for sequences in step for _, _, ids, _ in sequences]
        assert len(set(completions)) > len(completions) / 2, completions
        assert [ids for _, _, ids, _ in step[0]] != [ids for _, _, ids, _ in step[1]]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_before_the_first_step(case, folder):
    assert case.refused in (folder / case.name / "refusal.txt").read_text()


def test_processes_that_train_apart_are_refused(monkeypatch):
    """A launcher started two processes, and accelerate knows of one only: each would train on all rows by itself."""
    accelerator = Accelerator(cpu=True)
    check_wiring(accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 processes, but accelerate joined 1"):
        check_wiring(accelerator)


def test_one_process_resumes_as_if_never_stopped(models, tmp_path, alone):
    case = next(case for case in CASES if case.name == "resumed")
    stopped = dataclasses.replace(case.alone(), name="stopped", resume=3)
    run(stopped, models, tmp_path)
    result, reference = read(tmp_path / "stopped"), alone(case)
    assert [line["loss"] for line in result.steps] == [line["loss"] for line in reference.steps]
    assert all((weight == reference.weights[name]).all() for name, weight in result.weights.items())
