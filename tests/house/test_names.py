"""Names that pages and docstrings tell are there: files of the project, and modules and what they hold."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
PAGES += [*(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md"), *(ROOT / "gkd").rglob("*.py")]


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one, down to attributes of classes."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if part in fields:
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    files = set(re.findall(r"(?<![\w./-])(?:gkd|tests|docs|benchmarks)/[\w/]+\.(?:py|md)\b", text))
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    names = set(re.findall(r"(?<![\w/.\-])gkd(?:\.[A-Za-z_]\w*)+", text))
    assert [name for name in sorted(names) if not exists(name)] == []


def test_the_changelog_says_where_modules_went():
    table = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("### Where modules went")[1]
    now = re.findall(r"^\| `gkd[\w.]+` \| (.*) \|$", table, flags=re.MULTILINE)
    assert len(now) > 100
    names = {name for line in now for name in re.findall(r"`([\w.]+)`", line)}
    assert [name for name in sorted(names) if not exists(name)] == []
