"""Lays out the pages of the documentation site for mkdocs: `make docs`.

The pages stand as they do in the repository, so that a link means the same in both, and what they link to is beside
them. Each package gets a page made from its docstrings.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
# Which page comes where; a page that is new stands at the end until it has its place.
SECTIONS = {
    "Using it": "docs/getting_started docs/recipes recipes/README docs/chat docs/export docs/faq",
    "Distilling": "docs/losses docs/weights docs/rollouts docs/steering docs/teachers docs/teachers/context "
    "docs/teachers/other_tokenizer docs/teachers/own_template docs/teachers/self_teacher docs/teachers/several "
    "docs/teacher_sequences",
    "Running it": "docs/scaling docs/reliability docs/models docs/sweep",
    "Reference": "docs/fields docs/metrics docs/coming_from_trl docs/evidence CHANGELOG",
    "Changing it": "CONTRIBUTING docs/design",
}
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")  # the file of a link inside the repository


def pages() -> list[Path]:
    """Every page that there is for users and developers, relative to the repository."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "recipes" / "README.md"]
    named += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "studies").rglob("*.md"))]
    return [path.relative_to(ROOT) for path in named]


def linked(page: Path) -> set[Path]:
    """What a page links to that is no page itself, relative to the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = {(ROOT / page.parent / link).resolve() for link in _LINK.findall(text)}
    return {path.relative_to(ROOT) for path in found if path.is_file() and path.suffix != ".md"}


def packages() -> list[str]:
    """The packages and doors of `gkd`, in the order of docs/design.md."""
    table = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Rooms")[1].split("\n## ")[0]
    return [f"gkd.{name.removesuffix('.py')}" for name in re.findall(r"^\| `([\w.]+)` \|", table, flags=re.MULTILINE)]


def navigation() -> list[Any]:
    """The front page, the sections, what has no place yet, the studies, the packages."""
    sections = {title: [f"{name}.md" for name in names.split()] for title, names in SECTIONS.items()}
    placed = {"README.md", *(page for pages in sections.values() for page in pages)}
    rest = [str(page) for page in pages() if str(page) not in placed]
    sections["More"] = [page for page in rest if not page.startswith("studies/")]
    sections["Studies"] = [page for page in rest if page.startswith("studies/")]
    sections["Packages"] = [f"api/{name}.md" for name in packages()]
    return ["README.md", *({title: names} for title, names in sections.items() if names)]


def lay_out(to: Path) -> None:
    """Put everything there anew: the pages, and the configuration with the navigation."""
    shutil.rmtree(to / "pages", ignore_errors=True)
    own = pages()
    for path in {*own, *(file for page in own for file in linked(page))}:
        (to / "pages" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, to / "pages" / path)
    (to / "pages" / "api").mkdir()
    for name in packages():
        (to / "pages" / "api" / f"{name}.md").write_text(f"# `{name}`\n\n::: {name}\n", encoding="utf-8")
    configuration = {"INHERIT": str(ROOT / "mkdocs.yml"), "nav": navigation()}
    (to / "mkdocs.yml").write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    lay_out(ROOT / "build")
    print("laid out build/pages; mkdocs build -f build/mkdocs.yml makes the site of them")
