"""`--objective sft`: the data's answers first, without a teacher, and distillation from there."""

import json

import pytest
from user import flags

from gkd.cli import main
from gkd.commands.doctor.examine import examine
from gkd.commands.plan.memory import estimate
from gkd.commands.plan.plan import setup_of
from gkd.recipe.capture import capture
from gkd.recipe.settings import parse
from gkd.recipe.shipped import built_in


@pytest.mark.parametrize("name", sorted(built_in()))
def test_every_recipe_can_do_it(name, tmp_path):
    argv = ["--objective", "sft", "--output_dir", str(tmp_path), "--model_name_or_path", "a/student"]
    settings = capture(built_in()[name], argv).settings
    args = settings.training
    assert (args.lmbda, args.ce_weight, args.seq_kd, args.needs_teacher) == (0, 1, False, False)
    named = ("teacher_model_name_or_path", "teachers", "teacher_adapters", "self_teacher", "teacher_server_url")
    assert [name for name in named if getattr(args, name)] == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--lmbda", "0.5"], "lmbda=0.5 does not go with objective='sft'"),
        (["--ce_weight", "0.3"], "ce_weight=0.3 does not go"),
        (["--seq_kd", "true"], "seq_kd=true does not go"),
        (["--teacher_top_k", "8", "--log_top_k_overlap", "4"], "log_top_k_overlap=4 has no effect"),
        (["--teacher_chat_url", "http://x/v1", "--teacher_chat_model", "m"], "teacher_chat_url gives text"),
    ],
)
def test_what_says_otherwise_is_refused(given, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        parse({}, ["--objective", "sft", "--output_dir", str(tmp_path), *given])


def test_a_word_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="objective='dpo' is unknown: use one of distill, sft"):
        parse({}, ["--objective", "dpo", "--output_dir", str(tmp_path)])


def results(folder):
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    return {row["key"]: row for row in rows}


RECIPE = """
from gkd.run import dataset_by_name, run, with_held_out

run(lambda settings: with_held_out(dataset_by_name(settings), 4), defaults={
    "model_name_or_path": "a/student", "teacher_model_name_or_path": "a/teacher", "use_peft": True, "lora_r": 4,
    "teacher_model_init_kwargs": {"dtype": "float32"}, "lmbda": 0.5, "learning_rate": 0.01, "max_length": 128,
})
"""


def test_the_road_from_sft_to_an_adapter_to_distillation(folder, tmp_path):
    """The adapter of the first run is the student of the second, which begins where the first ended."""
    first, second, recipe = tmp_path / "sft", tmp_path / "gkd", tmp_path / "mine.py"
    recipe.write_text(RECIPE)
    argv = flags(folder, first, teacher_model_name_or_path=None, objective="sft")
    assert main(["run", str(recipe), *argv]) == 0
    of_first = results(first)
    assert "divergence_own" not in of_first
    assert of_first["perplexity"]["after"]["value"] < of_first["perplexity"]["before"]["value"]
    card = (first / "README.md").read_text()
    assert "trained by supervised fine-tuning on" in card
    assert "no teacher was asked" in card
    assert "to match" not in card
    argv = flags(folder, second, model_name_or_path=first, lmbda=0.5)
    assert main(["run", str(recipe), *argv]) == 0
    of_second = results(second)
    assert of_second["perplexity"]["before"]["value"] == pytest.approx(of_first["perplexity"]["after"]["value"])
    assert of_second["divergence_own"]["after"]["value"] > 0
    adapter = json.loads((second / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (4, str(folder / "student"))


def test_a_teacher_beside_it_is_for_the_table_and_is_not_loaded_where_there_is_none(folder, tmp_path):
    argv = flags(folder, tmp_path / "a", objective="sft", max_steps=1)
    assert main(["run", "gkd_qwen2", *argv]) == 0
    assert results(tmp_path / "a")["divergence_own"]["teacher"]["value"] == pytest.approx(0, abs=1e-6)
    assert "is there for comparison" in (tmp_path / "a" / "README.md").read_text()
    argv = flags(folder, tmp_path / "b", objective="sft", max_steps=1, evaluate_before_and_after="false")
    argv[argv.index("--teacher_model_name_or_path") + 1] = "no/such/model"
    assert main(["run", "gkd_qwen2", *argv]) == 0


def test_doctor_and_plan_do_without_a_teacher(folder, tmp_path):
    argv = flags(folder, tmp_path / "out", teacher_model_name_or_path=None, objective="sft")
    recipe = capture(built_in()["gkd_qwen2"], argv)
    found = examine(recipe)
    assert found.passed, [check for check in found.checks if check.level == "error"]
    said = {check.name: check.message for check in found.checks}
    assert "no teacher" in said["Tokenizers"]
    assert said["Models"].endswith("no teacher")
    parts = estimate(setup_of(recipe, 1, 0, False)).parts
    assert [name for name, size in parts.items() if "teacher" in name and size] == []
