"""A mixture of data sets: its shares, order, teachers and forms of rows, and that a run goes on with it."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from prepared import TOKENIZER
from safetensors.torch import load_file
from tiny import tiny_rows
from user import flags

from gkd.data.prepare import prepare_dataset
from gkd.recipe.mixture import entries_of
from gkd.recipe.rows import dataset_by_name, recipe_data
from gkd.recipe.settings import parse
from gkd.run import run


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of chats; pairs under other names; a saved data set with a test split, whose prompts are turns."""
    path = tmp_path_factory.mktemp("sets")
    chats = write(path / "chats.jsonl", [{**row, "id": n} for n, row in enumerate(tiny_rows(40))])
    pairs = [{"question": f"{n} + 1?", "answer": f"{n + 1}", "id": f"p{n}"} for n in range(30)]
    turns = [
        {"prompt": [{"role": "user", "content": f"Say {n}"}], "completion": [{"role": "assistant", "content": str(n)}]}
        for n in range(20)
    ]
    turns[3]["teacher"] = "chat"
    saved = DatasetDict(
        {"train": Dataset.from_list([{"teacher": None, **row} for row in turns]), "test": Dataset.from_list(turns[:4])}
    )
    saved.save_to_disk(path / "turns")
    return {"chats": chats, "pairs": write(path / "pairs.jsonl", pairs), "turns": str(path / "turns")}


RENAME = {"question": "prompt", "answer": "completion"}


def settings_of(entries: list[dict[str, Any]], tmp_path: Path, *more: str, **fields: Any) -> Any:
    file = tmp_path / "mixture.yaml"
    file.write_text(
        yaml.safe_dump({"datasets": entries, "output_dir": str(tmp_path / "out"), **fields}, sort_keys=False)
    )
    return parse({"dataset_name": "the/recipes", "dataset_config": "main"}, ["--config", str(file), *more])


def mixed(entries: list[dict[str, Any]], tmp_path: Path, **fields: Any) -> dict[str, Any]:
    return recipe_data(dataset_by_name, settings_of(entries, tmp_path, **fields))


def three(sets: dict[str, str], **shares: float) -> list[dict[str, Any]]:
    given = ({"path": sets["chats"]}, {"file": sets["pairs"], "columns": RENAME}, {"name": sets["turns"]})
    return [
        {**entry, **({"weight": share} if share else {})}
        for entry, share in zip(given, shares.values() or (None, None, None), strict=True)
    ]


def test_shares_are_those_of_the_weights_and_no_row_is_left_out(sets, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="gkd"):
        rows = mixed(three(sets, chats=3, pairs=1, turns=1), tmp_path)["train"]
    counts = {name: rows["mixed_from"].count(path) for name, path in sets.items()}
    bound = 4 * np.sqrt(0.6 * 0.4 * len(rows))  # standard deviations of a share
    assert abs(counts["chats"] - 0.6 * len(rows)) < bound
    assert abs(counts["pairs"] - 0.2 * len(rows)) < bound
    assert {row["prompt"] for row in rows if row["mixed_from"] == sets["pairs"]} == {f"{n} + 1?" for n in range(30)}
    assert f"{counts['chats']:,} of {sets['chats']} ({counts['chats'] / len(rows):.1%})" in caplog.text
    _, report = prepare_dataset(rows, TOKENIZER, max_length=None, max_prompt_length=None)
    assert report.mixed_from == {path: counts[name] for name, path in sets.items()}
    assert "mixed_from" not in report.unread
    assert "a mixture: " in str(report)


def test_fractions_repeat_no_row_and_without_a_share_every_row_is_there_once(sets, tmp_path):
    entries = [{**entry, "fraction": 1} for entry in three(sets)]
    rows = mixed(entries, tmp_path)["train"]
    of_pairs = [row["prompt"] for row in rows if row["mixed_from"] == sets["pairs"]]
    assert len(of_pairs) == len(set(of_pairs))
    assert len(rows) < 90
    assert len(mixed(three(sets), tmp_path)["train"]) == 90


def test_every_form_of_row_is_what_it_is_alone(sets, tmp_path):
    """Chats, pairs of texts and pairs of turns, whose columns `prompt` and `id` hold other things in each set."""
    rows = mixed(three(sets), tmp_path)["train"]
    options = {"max_length": None, "max_prompt_length": None}
    together, _ = prepare_dataset(rows, TOKENIZER, **options)
    alone = []
    for entry in three(sets):
        part, _ = prepare_dataset(mixed([entry], tmp_path)["train"], TOKENIZER, **options)
        alone += [(row["input_ids"], row["labels"]) for row in part]
    assert [(row["input_ids"], row["labels"]) for row in together] == alone


def test_the_order_is_a_function_of_the_seed_alone(sets, tmp_path):
    def order(**fields: Any) -> list[Any]:
        return [str(row) for row in mixed(three(sets, chats=1, pairs=2, turns=3), tmp_path, **fields)["train"]]

    first = order(seed=1)
    for module in (random, np.random, torch):  # ranks differ in these
        (module.manual_seed if module is torch else module.seed)(99)
    assert order(seed=1) == first
    assert order(seed=2) != first
    assert order(seed=2, data_seed=1) == first


def test_the_teachers_column(sets, tmp_path):
    entries = three(sets)
    for entry, teacher in zip(entries, ("math", None, "math"), strict=True):
        entry["teacher"] = teacher
    fields = {"teacher_adapters": json.dumps({"math": "a", "chat": "b"})}
    rows = mixed(entries, tmp_path, **fields)["train"]
    of_turns = [row["teacher"] for row in rows if row["mixed_from"] == sets["turns"]]
    assert of_turns == ["math"] * 3 + ["chat"] + ["math"] * 16  # a row's own stays
    assert {row["teacher"] for row in rows if row["mixed_from"] == sets["pairs"]} == {None}
    with pytest.raises(ValueError, match=r"datasets\[0\].*teacher='math': the teachers are chat"):
        mixed(entries, tmp_path, teacher_adapters=json.dumps({"chat": "b"}))
    with pytest.raises(ValueError, match=r"datasets\[0\].*teacher='math': there are not several teachers"):
        mixed(entries, tmp_path)


def test_held_out_rows_are_those_of_the_test_splits(sets, tmp_path):
    found = mixed(three(sets), tmp_path)["eval"]
    assert [row["completion"] for row in found] == [[{"role": "assistant", "content": str(n)}] for n in range(4)]
    assert mixed(three(sets)[:2], tmp_path)["eval"] is None
    both = [{"path": sets["turns"], "split": "test", "test_split": "train"}]
    assert len(mixed(both, tmp_path)["eval"]) == 20


MISTAKES = {
    "no entry": ([], r"datasets=\[\] should be a list"),
    "no mapping": (["a"], r"datasets\[0\]='a' should be a mapping"),
    "no path": ([{"weight": 1}], r"datasets\[0\] names no data set"),
    "a typing error": (
        [{"path": "CHATS", "wieght": 1}],
        r"datasets\[0\]: there is no key 'wieght'; did you mean weight",
    ),
    "a weight of nothing": ([{"path": "CHATS", "weight": 0}], r"datasets\[0\]: weight=0 should be a number above 0"),
    "one weight": ([{"path": "CHATS", "weight": 1}, {"path": "PAIRS"}], r"datasets\[1\] .* has no weight"),
    "both": ([{"path": "CHATS", "weight": 1, "fraction": 1}], "weight and fraction both say its share"),
    "twice": ([{"path": "CHATS", "file": "PAIRS"}], r"datasets\[0\]: file says path a second time"),
    "of TRL": ([{"path": "json", "data_files": "x"}], r"data_files is not supported: give the file"),
    "a split": ([{"path": "TURNS", "split": "dev"}], r"datasets\[0\] .* there is no split 'dev': it has train, test"),
    "a test split": ([{"path": "CHATS", "test_split": "dev"}], r"datasets\[0\] .* there is no split 'dev'"),
    "its own": ([{"path": "TURNS", "test_split": "train"}], "test_split='train' is what is trained on"),
    "a column": ([{"path": "PAIRS"}, {"path": "PAIRS", "columns": {"q": "prompt"}}], r"datasets\[1\].*no column 'q'"),
    "columns": ([{"path": "PAIRS", "columns": {"question": 1}}], r"datasets\[0\]: columns=.* mapping of old names"),
    "a file": ([{"path": "PAIRS"}, {"path": "none.jsonl"}], r"datasets\[1\] \(none.jsonl\): the data file none.jsonl"),
    "a name": ([{"path": "me/none"}], r"datasets\[0\] \(me/none\): path='me/none' is neither a local file"),
    "a configuration": ([{"path": "CHATS", "name": "main"}], r"datasets\[0\] .* name='main' has no effect"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_entry(name, sets, tmp_path):
    entries, words = MISTAKES[name]
    filled = json.loads(json.dumps(entries).replace('"CHATS"', json.dumps(sets["chats"])))
    filled = json.loads(json.dumps(filled).replace('"PAIRS"', json.dumps(sets["pairs"])))
    filled = json.loads(json.dumps(filled).replace('"TURNS"', json.dumps(sets["turns"])))
    with pytest.raises(ValueError, match=words):
        mixed(filled, tmp_path)


def test_it_stands_in_the_place_of_a_data_set(sets, tmp_path):
    settings = settings_of(three(sets), tmp_path)
    assert settings.script.dataset_name is None
    assert any("dataset_name=the/recipes is set aside" in remark for remark in settings.remarks)
    with pytest.raises(ValueError, match="datasets does not go with dataset_name='x'"):
        settings_of(three(sets), tmp_path, "--dataset_name", "x")
    with pytest.raises(ValueError, match=r"datasets=.* has no effect: this recipe's load_data brings its own data"):
        recipe_data(lambda settings: {"train": Dataset.from_list(tiny_rows(2))}, settings)
    flag = parse({}, ["--datasets", json.dumps(three(sets)), "--output_dir", str(tmp_path / "out")])
    assert entries_of(flag.script.datasets) == entries_of(settings.script.datasets)


def test_a_run_on_a_mixture_goes_on_as_if_it_had_not_stopped(folder, sets, tmp_path):
    entries = json.dumps(three(sets, chats=1, pairs=1, turns=1))

    def argv(name: str, **changes: Any) -> list[str]:
        values = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "constant",
            **changes,
        }
        values |= {"dataset_name": None, "datasets": entries, "evaluate_before_and_after": "false"}
        return flags(folder, tmp_path / name, **values)

    run(argv=argv("never"))
    run(argv=argv("stopped", max_steps=2))
    run(argv=argv("stopped", resume_from_checkpoint="true"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("never", "stopped"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    card = (tmp_path / "stopped" / "README.md").read_text()
    assert "chats.jsonl" in card
    assert "pairs.jsonl" in card
