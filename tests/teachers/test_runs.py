"""Runs, `gkd evaluate`, `gkd doctor` and `gkd plan` with a teacher on the student's base and with several teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM

from gkd.commands.doctor.examine import examine
from gkd.commands.evaluate import evaluate_recipe
from gkd.commands.plan.memory import estimate
from gkd.commands.plan.plan import setup_of
from gkd.data.held_out import with_held_out
from gkd.recipe.capture import capture
from gkd.recipe.rows import dataset_by_name
from gkd.run import run

RECIPE = """
from gkd.run import dataset_by_name, run, with_held_out

run(lambda settings: with_held_out(dataset_by_name(settings), 4), defaults={"max_new_tokens": 6, "seq_kd": True})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user")
    base = save_tiny(path / "base", seed=1)
    for seed, name in enumerate(("math", "chat", "trained")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tuned = get_peft_model(tiny_model(seed=1), LoraConfig(r=4, target_modules="all-linear"))
            for parameter in (p for n, p in tuned.named_parameters() if "lora_B" in n):
                parameter.data.normal_(std=0.2)
        tuned.peft_config["default"].base_model_name_or_path = base
        tuned.save_pretrained(path / name)
        if name == "math":
            tuned.merge_and_unload().save_pretrained(path / "math-merged")
            tiny_tokenizer().save_pretrained(path / "math-merged")
    rows = [{**row, "teacher": ("math", "chat")[i % 2]} for i, row in enumerate(tiny_rows(16))]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (path / "recipe.py").write_text(RECIPE)
    return path


def flags(folder: Path, **changes: Any) -> list[str]:
    values = {
        "model_name_or_path": folder / "base",
        "dataset_name": folder / "rows.jsonl",
        "use_peft": True,
        "lora_r": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "num_eval_prompts": 3,
        "logging_steps": 1,
        "report_to": "none",
        **changes,
    }
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def whole(folder: Path, **changes: Any) -> list[str]:
    """A student without an adapter."""
    return flags(folder, use_peft=None, lora_r=None, **changes)


def shared(folder: Path, **changes: Any) -> list[str]:
    return flags(folder, share_base_model=True, teacher_adapter_name_or_path=folder / "math", **changes)


def several(folder: Path, **changes: Any) -> list[str]:
    adapters = json.dumps({name: str(folder / name) for name in ("math", "chat")})
    return flags(folder, share_base_model=True, teacher_adapters=adapters, **changes)


def recipe_of(folder: Path, argv: list[str]) -> Any:
    return capture(folder / "recipe.py", argv)


def test_a_run_with_a_shared_base_is_measured_and_described(folder, tmp_path):
    data = lambda settings: with_held_out(dataset_by_name(settings), 4)  # noqa: E731
    run(data, defaults={"seq_kd": True, "max_new_tokens": 6}, argv=shared(folder, output_dir=tmp_path / "out"))
    out = tmp_path / "out"
    card = (out / "README.md").read_text()
    assert "The teacher is the student's base model" in card
    assert "carries the adapter `math`" in card
    assert str(folder) not in card.split("How it was trained")[0]
    rows = {row["key"]: row for row in json.loads((out / "evaluation.json").read_text())["rows"]}
    assert rows["divergence_own"]["before"]["value"] > 1e-3
    assert rows["divergence_own"]["teacher"]["value"] == pytest.approx(0, abs=1e-6)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/teacher" in entry for entry in history)


def test_a_run_with_several_teachers(folder, tmp_path):
    run(argv=several(folder, output_dir=tmp_path / "out", max_new_tokens=6, evaluate_before_and_after="false"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Several teachers" in card
    assert "math (`math`), chat (`chat`)" in card
    history = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any({"teacher/math/divergence", "teacher/chat/agreement"} <= set(entry) for entry in history)


def test_evaluate_measures_as_with_a_teacher_of_its_own(folder):
    """The teacher is the same, its adapter on the shared base or merged into a model of its own, also
    while the student carries an adapter of its own."""
    adapter = str(folder / "trained")
    own = evaluate_recipe(recipe_of(folder, whole(folder, teacher_model_name_or_path=folder / "math-merged")), adapter)
    for argv in (
        shared(folder),
        whole(folder, teacher_model_name_or_path=folder / "base", teacher_adapter_name_or_path=folder / "math"),
    ):
        found = evaluate_recipe(recipe_of(folder, argv), adapter)
        assert [column.name for column in found] == ["student", "student + adapter", "teacher"]
        for mine, theirs in zip(found, own, strict=True):
            for key, value in mine.values.items():
                assert value.value == pytest.approx(theirs.values[key].value, rel=1e-4, abs=1e-6), (mine.name, key)
    student, trained, _ = own
    assert student.values["perplexity"].value != pytest.approx(trained.values["perplexity"].value, rel=1e-3)


@pytest.mark.parametrize("argv", [shared, several])
def test_the_doctor_finds_nothing_wrong(argv, folder):
    found = examine(recipe_of(folder, argv(folder)))
    assert found.passed, [(check.name, check.message) for check in found.checks if check.level == "error"]
    assert any("the same base model" in check.message for check in found.checks)


def test_evaluate_with_several_teachers_measures_each_row_against_its_own(folder):
    columns = evaluate_recipe(recipe_of(folder, several(folder)), str(folder / "trained"))
    assert [column.name for column in columns] == ["student", "student + adapter", "teacher"]
    assert {"divergence_own", "divergence_own_math"} <= set(columns[1].values)
    assert columns[2].values["divergence_own"].value == pytest.approx(0, abs=1e-6)


def test_the_plan_counts_one_copy_of_the_weights(folder):
    argv = flags(folder, teacher_model_name_or_path=folder / "base")
    two = setup_of(recipe_of(folder, argv), gpus=1, zero_stage=0, offload=False)
    one = setup_of(recipe_of(folder, shared(folder)), gpus=1, zero_stage=0, offload=False)
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "base").parameters()) * 4
    assert estimate(two).peak - estimate(one).peak == weights
    assert estimate(one).parts["teacher weights"] == 0
    assert estimate(one).parts["teacher activations"] == estimate(two).parts["teacher activations"]
