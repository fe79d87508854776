"""The recipes that come with the package: found by name, so that they run without a clone."""

from __future__ import annotations

import ast
import difflib
from pathlib import Path

from gkd.common.distribution import shipped_folder

LAUNCH_FILES = "deepspeed_configs"


def built_in() -> dict[str, Path]:
    """Name -> file, in alphabetical order."""
    folder = shipped_folder("recipes")
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.py"))}


def what_it_is(path: Path) -> str:
    """The first line of a recipe's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def launch_files() -> dict[str, Path]:
    """Name -> file of those for `accelerate launch`."""
    folder = shipped_folder(LAUNCH_FILES)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_file(path: str | Path) -> Path:
    """The file of a recipe that is named by its path, or is one that comes with the package.

    Raises:
        ValueError: there is none.
    """
    given = Path(path)
    if given.is_file():
        return given
    known = built_in()
    if str(path) in known:
        return known[str(path)]
    near = difflib.get_close_matches(given.stem, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "name a file, or one of those that `gkd recipes` lists"
    raise ValueError(f"there is no recipe {str(path)!r}: {hint}")
