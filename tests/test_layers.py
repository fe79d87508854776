"""The house's walls: a module imports from lower levels only, `import gkd.divergence` loads only torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gkd"

LEVELS = {
    0: {"_version", "errors", "source", "batch", "divergence", "integrand", "dense_loss", "rounding"},
    1: {
        "signals",
        "fused",
        "fused_pass",
        "fused_projection",
        "fused_rows",
        "fused_compiled",
        "loss_settings",
        "metrics",
        "config",
        "config_servers",
        "config_values",
        "field_types",
        "config_teacher",
        "rows",
        "row_values",
        "token_rows",
        "turns",
        "encode",
        "templates",
        "turn_spans",
        "left_out",
        "files",
        "data",
        "data_kinds",
        "data_report",
        "unread",
        "vocab",
        "measures",
        "comparison",
        "markdown",
        "environment",
        "sequence_store",
        "score_store",
        "dataset_folder",
        "held_out",
        "redact",
        "card",
        "card_info",
        "card_settings",
        "last_turn",
        "plots",
        "positions",
        "config_logging",
    }
    | {"random_state", "disk", "checkpoint_files", "checkpoint_faults", "output_folder", "safe_pickles", "launcher"},
    2: {
        "teachers",
        "rollouts",
        "distributed",
        "hidden",
        "loading",
        "setup_checks",
        "launch_checks",
        "student_setup",
        "window",
        "preparation",
        "memory",
        "placement",
        "quantized",
        "tokenizer_options",
        "template_day",
    }
    | {
        "lengths",
        "rollout_check",
        "bounded_http",
        "vllm_answers",
        "precision",
        "vllm_client",
        "vllm_checks",
        "servers",
        "teacher_setup",
        "teacher_scores",
        "absent_teacher",
        "adapters",
    },
    3: {
        "trainer",
        "trainer_card",
        "trl_attributes",
        "trainer_evaluation",
        "trainer_logging",
        "trainer_window",
        "checkpoint",
        "going_on",
        "belongs",
        "faults",
        "progress",
        "completions",
        "hub",
    },
    4: {
        "run",
        "run_end",
        "settings",
        "command_line",
        "set_aside",
        "recipe",
        "evaluate",
        "report",
        "precompute",
        "precompute_scores",
        "plan",
        "demo",
        "demo_models",
        "demo_data",
        "demo_fetch",
        "demo_minimind",
        "doctor",
        "doctor_rows",
        "doctor_view",
        "evaluate_recipe",
        "new_recipe",
        "look",
        "doctor_cost",
        "evaluate_forward",
        "evaluate_teacher",
        "public_tasks",
        "task_score",
    },
    5: {"cli"},
}
TORCH_ONLY = {"source", "batch", "divergence"}


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level_of(name: str) -> int:
    found = [level for level, names in LEVELS.items() if name in names]
    assert found, f"gkd/{name} has no level: add it to tests/test_layers.py"
    return found[0]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "gkd"}
    return names


FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = module_name(path)
    for name in imports(path):
        if not name.startswith("gkd."):
            continue
        other = name.split(".")[1]
        if other.startswith("__") or other == own:
            continue
        assert level_of(other) <= level_of(own), f"gkd.{own} (level {level_of(own)}) imports gkd.{other}"
        assert {own, other} != {"teachers", "rollouts"}, "teachers and rollouts do not know each other"


@pytest.mark.parametrize("name", sorted(TORCH_ONLY))
def test_level_zero_needs_torch_only(name):
    code = (
        f"import sys; import gkd.{name};"
        "bad = {'transformers', 'trl', 'peft', 'accelerate', 'datasets', 'deepspeed'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_vllm_is_never_imported():
    for path in FILES:
        assert not any(name.split(".")[0] == "vllm" for name in imports(path)), path


def test_recipes_import_only_the_runner():
    for path in (ROOT / "recipes").glob("*.py"):
        for name in imports(path):
            allowed = ("gkd.run", "gkd.demo", "datasets", "rouge_score", "sacrebleu", "__future__", "typing")
            assert name.startswith(allowed) or name in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_public_names_are_lazy_and_exact():
    code = (
        "import sys, gkd; assert 'torch' not in sys.modules;"
        "assert sorted(gkd.__all__) == ['GKDConfig', 'GKDTrainer', '__version__'];"
        "from gkd import GKDConfig, GKDTrainer; assert GKDTrainer.__module__ == 'gkd.trainer'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
