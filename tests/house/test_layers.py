"""The house's walls: a package imports only from those before it, and its docstring names every file in it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gkd"
# Mathematics at the bottom, machines on top, and two doors.
ORDER = [
    "_version",
    "common",
    "loss",
    "models",
    "servers",
    "data",
    "demo",
    "rollouts",
    "teachers",
    "evaluation",
    "config",
    "assembly",
    "report",
    "training",
    "recipe",
    "run",
    "commands",
    "cli",
]
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
PACKAGES = [path for path in sorted(PACKAGE.rglob("*/")) if (path / "__init__.py").exists() and path != PACKAGE]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "gkd"}
    return names


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("gkd.")} - {"__version__"}


def test_every_room_has_its_place():
    assert {room_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_from_those_before_it(path):
    own = ORDER.index(room_of(path))
    for room in rooms_imported(path) & set(ORDER):
        assert ORDER.index(room) <= own, f"gkd.{ORDER[own]} imports gkd.{room}, which comes after it"


def test_below_the_assembly_nobody_knows_the_config():
    below = set(ORDER[: ORDER.index("assembly")]) - {"config"}
    assert [str(p) for p in FILES if room_of(p) in below and "config" in rooms_imported(p)] == []


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_packages_docstring_names_its_files(folder):
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    named = set(re.findall(r"^(\w+): ", ast.get_docstring(tree, clean=False) or "", flags=re.MULTILINE))
    files = {p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "__main__")}
    folders = {p.name for p in folder.iterdir() if (p / "__init__.py").exists()}
    assert named == files | folders


def test_the_loss_needs_torch_only():
    code = (
        "import sys; from gkd.loss import make_divergence, DIVERGENCES, Divergence, fused_divergence, LossSettings, "
        "DenseSignal, TopKSignal, Head;"
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
        "from gkd import GKDConfig, GKDTrainer; import gkd.config; assert gkd.config.GKDConfig is GKDConfig"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert not any(name.startswith("test_") for name in imports(path)), path
