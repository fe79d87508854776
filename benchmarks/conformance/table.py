"""benchmarks/results/conformance.json as the section `## Conformance` of docs/evidence.md.

python benchmarks/conformance/table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "conformance.json"
PAGE = ROOT / "docs" / "evidence.md"
TITLE = "## Conformance"
MARKS = {"pass": "pass", "fail": "**fail**", "not applicable": "–"}

INTRODUCTION = """\
What a distillation trainer must keep, asked of this package and its peers in the same words: the same small models
and rows, each peer by the interface that it documents, with its defaults. What is right comes from the definition in
float64 (`benchmarks/conformance/definition.py`), not from this package. A step is seen from outside: the rows that
pass the student while gradients are recorded, and how one step of plain SGD moves the weights.

– is not applicable: the peer has no such thing, or refuses it in words; of Liger and ms-swift the loss alone is asked.
Every failure has its line below.

    make conformance

asks again: about a quarter of an hour on two cores, with an environment of its own for the peers that need one.
"""


def section(results: dict[str, Any]) -> str:
    """The section, from its title to its last line."""
    columns = list(results.values())
    groups: dict[str, list[str]] = {}
    for name, cell in columns[0]["cells"].items():
        groups.setdefault(cell["group"], []).append(name)
    lines = [TITLE, "", INTRODUCTION]
    lines += [f"| | {' | '.join(column['name'] for column in columns)} |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| *version* | {' | '.join(column['version'] for column in columns)} |"]
    for group, names in groups.items():
        lines.append(f"| **{group}** |" + " |" * len(columns))
        for name in names:
            marks = (MARKS[column["cells"][name]["verdict"]] for column in columns)
            lines.append(f"| {name} | {' | '.join(marks)} |")
    lines += ["", "Where the failures come from:", ""]
    lines += _failures(columns)
    return "\n".join(lines) + "\n"


def _failures(columns: list[dict[str, Any]]) -> list[str]:
    """A line for each cause: where it is, whose, what it does, and what was found in the cases that fail by it."""
    causes: dict[tuple[str, str], tuple[list[str], dict[str, str]]] = {}
    for column in columns:
        for name, cell in column["cells"].items():
            if cell["verdict"] == "fail":
                whose, cases = causes.setdefault((cell["source"], cell["why"]), ([], {}))
                cases.setdefault(name, cell["detail"])
                whose += [] if column["name"] in whose else [column["name"]]
    lines = []
    for (source, why), (whose, cases) in causes.items():
        found = "; ".join(f"*{name}*: {detail}" for name, detail in cases.items())
        lines.append(f"- `{source}` ({', '.join(whose)}): {why}. {found}.")
    return lines


def with_section(page: str, text: str) -> str:
    """A page with its section replaced, or put at its end."""
    found = re.search(rf"^{TITLE}\n.*?(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{page.rstrip()}\n\n{text}"
    rest = page[found.end() :]
    return page[: found.start()] + text + ("\n" + rest if rest else "")


def main() -> None:
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Evidence\n"
    PAGE.write_text(with_section(page, section(json.loads(RESULTS.read_text()))), encoding="utf-8")


if __name__ == "__main__":
    main()
