"""The README says what the code does: its fields, files, links and examples. tests/test_docs_pages.py has the rest."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny import save_tiny
from trl import SFTConfig

from gkd import GKDConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "recipes").glob("*.md"),
]


def test_the_table_of_fields_is_complete_and_true():
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    table = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", README, flags=re.MULTILINE))
    own = {field.name: str(field.default) for field in dataclasses.fields(GKDConfig) if field.name not in inherited}
    assert table == own


def test_the_tree_names_every_file():
    tree = README[README.index("## The files") :]
    for folder in ("gkd", "recipes", "deepspeed_configs", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md") and path.name not in ("__init__.py", "README.md"):
                assert path.name in tree, f"{path.relative_to(ROOT)} has no line in the README's tree"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_readmes_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = next(block for block in python_blocks(README) if "trainer.train()" in block)
    block = block.replace("Qwen/Qwen2-0.5B-Instruct", save_tiny(tmp_path / "student"))
    block = block.replace("Qwen/Qwen2-1.5B-Instruct", save_tiny(tmp_path / "teacher", seed=2))
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_readmes_recipe_runs(tmp_path, monkeypatch):
    block = next(block for block in python_blocks(README) if "def load_data" in block)
    (tmp_path / "sums.py").write_text(block)
    values = {
        "model_name_or_path": save_tiny(tmp_path / "student"),
        "teacher_model_name_or_path": save_tiny(tmp_path / "teacher", seed=2),
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "num_eval_prompts": 3,
        "report_to": "none",
    }
    argv = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["sums.py", *argv])
    runpy.run_path(str(tmp_path / "sums.py"), run_name="__main__")
    assert '"score_greedy"' in (tmp_path / "out" / "evaluation.json").read_text()
