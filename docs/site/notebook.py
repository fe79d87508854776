"""docs/example_session.ipynb, made from the cells of docs/example_session.py: run `python docs/site/notebook.py` after
a change there; a test holds it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SESSION = Path(__file__).resolve().parents[1] / "example_session.py"
NOTEBOOK = SESSION.with_suffix(".ipynb")


def cells(text: str) -> list[dict[str, Any]]:
    """Each `# %%` of a script as a cell; the words behind the mark are its first comment."""
    found: list[dict[str, Any]] = []
    for number, (mark, body) in enumerate(re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", text, flags=re.MULTILINE)):
        markdown = mark.strip() == "[markdown]"
        lines = body.strip("\n").split("\n")
        if markdown:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        else:
            lines = [f"# {mark.strip()}", *lines]
        cell = {"cell_type": "markdown" if markdown else "code", "id": f"cell-{number}", "metadata": {}}
        cell["source"] = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
        found.append(cell if markdown else {**cell, "execution_count": None, "outputs": []})
    return found


def notebook() -> str:
    """The file's text."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    page = {
        "cells": cells(SESSION.read_text(encoding="utf-8")),
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(page, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
    print(f"wrote {NOTEBOOK}")
