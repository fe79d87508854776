"""The README says what the code does: its fields, files, links and examples. tests/house/test_docs_pages.py has the
rest."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "recipes").glob("*.md"),
    *(ROOT / "studies").rglob("*.md"),
]


def test_the_table_of_fields_is_the_configs():
    made = runpy.run_path(str(ROOT / "docs" / "fields.py"))["page"]()
    assert made == (ROOT / "docs" / "fields.md").read_text(encoding="utf-8"), "run python docs/fields.py"


def test_the_readme_is_short_and_names_every_package():
    assert len(README.splitlines()) <= 200
    for folder in (ROOT / "gkd").iterdir():
        if (folder / "__init__.py").exists():
            assert f"| `{folder.name}` |" in README, folder.name


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
