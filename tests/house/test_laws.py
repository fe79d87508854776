"""Each law of docs/design.md names the file in tests/laws/ that holds it, and there is no other file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("\n## Laws\n")[1].split("\n## ")[0]
LAWS = [" ".join(text.split()) for text in re.split(r"\n(?=\d\. )", SECTION)[1:]]


def title(law):
    return re.match(r"\d\. \*\*(.+?)\.\*\*", law)[1]


def test_every_file_is_that_of_a_law():
    assert len(LAWS) == 8
    named = {name for law in LAWS for name in re.findall(r"`(tests/laws/\w+\.py)`", law)}
    assert named == {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "laws").glob("*.py")}


@pytest.mark.parametrize("law", LAWS, ids=title)
def test_a_laws_file_has_its_name_and_says_it(law):
    name = re.sub(r"\W+", "_", title(law).lower())
    assert law.endswith(f"`tests/laws/test_{name}.py`")
    text = (ROOT / "tests" / "laws" / f"test_{name}.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)).startswith(f"Law {law[0]}: ")
    assert re.search(r"^def test_", text, re.MULTILINE)
