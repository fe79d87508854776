"""The private names of other libraries that the package leans on are there: an upgrade breaks here first."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from trl import SFTTrainer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Private names of other libraries")[1].split("\n## ")[0]
NAMES = re.findall(r"^\| `([\w.]+)` \|", SECTION, flags=re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_there(name):
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return
    pytest.fail(name)


@pytest.mark.parametrize("name", ["_metrics", "_total_train_tokens"])
def test_an_attribute_of_the_trainer_is_set(name):
    assert f"self.{name} = " in inspect.getsource(SFTTrainer)
    assert f"`{name}`" in SECTION
