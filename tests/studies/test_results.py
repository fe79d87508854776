"""The studies: the tables of their pages are those of their raw results."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = runpy.run_path(str(ROOT / "studies" / "tables.py"), run_name="tables")
KEPT = sorted((ROOT / "studies").glob("*/results/*.json"))
SWEPT = [path for path in KEPT if '"cells"' in path.read_text(encoding="utf-8")[:20000]]


@pytest.mark.parametrize("page", TABLES["PAGES"], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_table_of_a_page_is_that_of_the_raw_results(page):
    text = page.read_text(encoding="utf-8")
    assert TABLES["written_anew"](text) == text


def test_a_number_that_was_changed_by_hand_is_seen():
    page = (ROOT / "studies" / "top_k" / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: " in page
    changed = page.replace(" 0.68 ", " 0.78 ", 1)
    assert changed != page
    assert TABLES["written_anew"](changed) == page


def test_means_errors_and_paired_differences_by_hand(tmp_path):
    runs = [
        {"cell": cell, "seed": seed, "tuning": False, "measures": {"score_greedy": {"before": 0.1, "after": value}}}
        for cell, values in {"a": (0.2, 0.4), "b": (0.5, 0.9)}.items()
        for seed, value in enumerate(values)
    ]
    runs.append({"cell": "b", "seed": 9, "tuning": True, "measures": {"score_greedy": {"after": 7.0}}})
    (tmp_path / "x.json").write_text(json.dumps({"cells": ["a", "b"], "runs": runs}))
    rows = TABLES["table"](tmp_path / "x.json", ["score_greedy %", "score_greedy.before"]).splitlines()
    assert rows[2:] == [
        "| a | 30.0 ± 10.0 |  | 0.100 ± 0.000 |",
        "| b | 70.0 ± 20.0 | +40.0 ± 10.0 | 0.100 ± 0.000 |",
    ]


@pytest.mark.parametrize("path", SWEPT, ids=lambda path: f"{path.parents[1].name}/{path.name}")
def test_what_is_kept_says_where_it_comes_from_and_misses_no_run(path):
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert len(kept["commit"]) == 40
    assert kept["command"].split()[0] in ("gkd", "python")
    runs = [(run["cell"], run["seed"]) for run in kept["runs"] if not run.get("tuning")]
    assert len(set(runs)) == len(runs)
    assert len(runs) + len(kept["failed"]) == len(kept["cells"]) * len(kept["seeds"])


def test_raw_results_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "studies").rglob("results/*")) < 2_000_000
