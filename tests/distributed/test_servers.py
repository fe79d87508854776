"""A student that writes on a server, and a teacher with another tokenizer that scores on one: two processes get what
one gets, and all ranks hear of a refusal.

The servers stand in the test process; the ranks upload and ask from theirs. Under ZeRO-3 the adapter is split up.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import SPLIT_ALL, Case
from launch import fork
from other_tokens import other_model, other_tokenizer
from results import assert_equal, assert_saved_whole, largest_differences, read
from tiny import tiny_model
from vllm_server.fake import FakeServer

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("operators")]


@pytest.fixture(scope="module")
def ran(models: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("servers")
    plan = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
    plan |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    (out / "zero3.json").write_text(json.dumps({**plan, "zero_optimization": {"stage": 3, **SPLIT_ALL}}))
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(out / "zero3.json")}
    other = FakeServer(other_model().eval(), other_tokenizer(), root=str(models / "other"))
    with FakeServer(tiny_model(seed=1)) as server, FakeServer(tiny_model(seed=1), max_lora_rank=1) as strict, other:
        args = {"rollout_backend": "vllm", "rollout_server_url": server.url, "gradient_accumulation_steps": 2}
        ahead = {**args, "rollout_staleness": 1}
        cases = [
            Case("ddp", args, engine="ddp"),
            Case("ahead", ahead, engine="ddp"),
            Case("aligned", {"teacher_server_url": other.url, "teacher_top_k": 12}, engine="ddp", aligned=True),
            Case("zero3", args, environment=zero, engine="zero-3"),
            Case("ahead_zero3", ahead, environment=zero, engine="zero-3"),
        ]
        refused = Case("refused", {**args, "rollout_server_url": strict.url}, refused="is greater than max_lora_rank")
        # ZeRO-3 last: what transformers remembers of it outlives its case
        fork([*cases[:3], refused, *cases[3:]], models, out)
        yield out, cases, server


@pytest.mark.parametrize("number", range(5), ids=["ddp", "ahead", "aligned", "zero3", "ahead_zero3"])
def test_two_processes_equal_one(number, ran, alone, models):
    out, cases, _ = ran
    result, reference = read(out / cases[number].name), alone(cases[number])
    assert len(result.ranks) == 2
    print(largest_differences(result, reference))
    assert_equal(result, reference)
    assert_saved_whole(result, result.folder / "final", models / cases[number].student)


def test_a_refused_adapter_is_a_refusal_on_every_rank(ran):
    assert "--max-lora-rank 4" in (ran[0] / "refused" / "refusal.txt").read_text()


def test_one_rank_uploads_and_all_ask_for_its_adapter(ran):
    loads = [body["lora_name"] for path, body in ran[2].seen if path == "/v1/load_lora_adapter"]
    assert len(loads) == len(set(loads))
    for run in {name.split("-")[1] for name in loads}:
        versions = [name.split("-")[2] for name in loads if name.split("-")[1] == run]
        assert versions in (list("01234"), list("013")), versions
    asked = {body["model"] for path, body in ran[2].seen if path == "/v1/completions"}
    assert asked <= set(loads)
