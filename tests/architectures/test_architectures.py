"""A few cases of the architecture matrix, so that it stays runnable; all of them: `make test-architectures`."""

import pytest
from matrix import Case, cases, run_case, verdict
from page import table


@pytest.mark.parametrize(
    "case",
    [Case("gemma2", "lora", "window8_cap3"), Case("granite", "full", "scaled"), Case("qwen3_moe", "lora")],
    ids=lambda case: case.name,
)
def test_an_architecture_is_right(case):
    record = run_case(case)
    assert verdict(record) == "ok", record


def test_every_decoder_of_transformers_has_a_case_or_a_reason():
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
    assert len({case.model_type for case in cases()}) > 140


def test_a_wrong_result_is_told():
    right = {"loss": [1e-8, 1e-8], "gradient": [1e-7, 1e-7], "rollout": 8}
    assert verdict(right) == "ok"
    assert verdict(right | {"rollout": 7, "batch": 6}) == "rollout 7/8 (generate's own batch: 6/8)"
    assert verdict(right | {"loss": [1e-8, 1e-3]}) == "loss 1e-03"
    assert verdict({"error": "ValueError: no"}) == "ValueError: no"
    records = [
        {"name": f"llama-{training}", "model_type": "llama", "variant": "", "training": training} | numbers
        for training, numbers in (("lora", right), ("full", right | {"rollout": 0, "batch": 8}))
    ]
    assert "1 of 2 cases are right" in table(records)
    assert "llama (lora only)" in table(records)
    assert "| llama-full | rollout 0/8 (generate's own batch: 8/8) |" in table(records)
