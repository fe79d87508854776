"""Held-out prompts are not trained on; what a recipe is told about its data set is read or refused."""

import json
import logging
import random
import runpy
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import tiny_rows, tiny_tokenizer

from gkd.data.held_out import hold_out, overlap, prompt_key, warn_of_overlap, with_held_out
from gkd.data.prepare import prepare_dataset
from gkd.data.sequences import prompt_of
from gkd.recipe.rows import dataset_by_name, recipe_data
from gkd.recipe.settings import parse

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def chat(question, answer="yes", system=None):
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


FORMATS = {
    "messages": lambda i, j: chat(f"question {i}", f"answer {j}"),
    "white space": lambda i, j: chat(f"question {i}" + " " * j, f"answer {j}"),
    "pairs": lambda i, j: {"prompt": f"question {i}", "completion": f"answer {j}"},
    "prompts": lambda i, j: {"prompt": [{"role": "user", "content": f"question {i}"}]},
    "alpaca": lambda i, j: {"instruction": "Do it.", "input": f"with {i}", "output": f"answer {j}"},
    "ids": lambda i, j: {"input_ids": [i + 1, 7, j + 1], "labels": [-100, -100, j + 1]},
    "text": lambda i, j: {"text": f"text {i}"},
    "unknown": lambda i, j: {"who": i, "knows": "this"},
}


@pytest.mark.parametrize("form", FORMATS)
def test_rows_with_one_prompt_stay_together(form):
    """Half of the prompts occur two to five times, in any order, as any data set that was not made for this."""
    draw = random.Random(0)
    rows = [FORMATS[form](i, j) for i in range(60) for j in range(draw.choice((1, 1, 2, 5)))]
    draw.shuffle(rows)
    data = with_held_out({"train": Dataset.from_list(rows)}, 12)
    train, held_out = ([prompt_key(row) for row in data[name]] for name in ("train", "eval"))
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == len(rows)  # and none is lost
    assert 8 <= len(held_out) <= 12
    assert list(with_held_out({"train": Dataset.from_list(rows)}, 12)["eval"]) == list(data["eval"])


def test_where_every_prompt_occurs_once_the_split_is_that_of_datasets():
    rows = Dataset.from_list([{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(200)])
    train, held_out = hold_out(rows, 30)
    theirs = rows.train_test_split(test_size=30, seed=0)
    assert (train["prompt"], held_out["prompt"]) == (theirs["train"]["prompt"], theirs["test"]["prompt"])


def test_columns_are_renamed_before_the_prompts_are_held_out():
    """A question with several answers, whose columns no format knows."""
    rows = Dataset.from_list([{"q": f"question {i % 20}", "a": f"answer {i}"} for i in range(60)])
    data = with_held_out({"train": rows, "eval": None}, 64, lambda row: {"prompt": row["q"], "completion": row["a"]})
    assert len(data["eval"]) == 6
    assert not set(data["train"]["q"]) & set(data["eval"]["q"])
    given = with_held_out({"train": rows, "eval": rows}, 64, lambda row: {"prompt": row["q"]})
    assert given["eval"]["prompt"] == rows["q"]


def test_prompts_that_fill_the_data_set(caplog):
    often = [{"prompt": "the same", "completion": str(i)} for i in range(90)]
    rare = [{"prompt": f"rare {i // 3}", "completion": str(i)} for i in range(9)]
    train, held_out = hold_out(Dataset.from_list([*often, *rare]), 2)
    assert len(set(held_out["prompt"])) == 1  # three rows, although two were asked for: no prompt has fewer
    assert (len(train), len(held_out)) == (96, 3)
    train, held_out = hold_out(Dataset.from_list(often), 5)
    assert (len(train), len(held_out)) == (85, 5)
    assert "all 90 rows have the same prompt" in caplog.text


def test_a_system_turn_and_tools_belong_to_the_prompt():
    assert prompt_key(chat("a")) == prompt_key(chat(" a\n", "no"))
    assert prompt_key(chat("a")) != prompt_key(chat("a", system="b"))
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert prompt_key(chat("a")) != prompt_key({**chat("a"), "tools": tools})


def test_overlap_is_that_of_token_ids(caplog):
    tokenizer = tiny_tokenizer()
    rows = [*tiny_rows(40), *tiny_rows(5), *[chat("one", str(i)) for i in range(2300)]]
    prepared, _ = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=200, max_prompt_length=100)
    prepared = prepared.shuffle(seed=1)
    ids = [prompt_of(row) for row in prepared]
    held_out = [ids[3], [1, 2, 3], tokenizer("one")["input_ids"], ids[-1]]
    found = overlap(prepared, held_out)
    whole = Counter(tuple(row["input_ids"]) for row in prepared)
    assert (found.rows, found.repeated) == (len(prepared), sum(whole.values()) - len(whole))
    assert (found.held_out, found.shared) == (4, sum(prompt in ids for prompt in held_out)) == (4, 2)
    with caplog.at_level(logging.WARNING):
        warn_of_overlap(prepared, held_out[1:3])
        assert caplog.text == ""
        warn_of_overlap(prepared, held_out)
    assert "2 of 4 held-out prompts are also trained on" in caplog.text


# ------------------------------------------------------------------------------------------ what is said of the data


def own_rows(settings):
    return {"train": Dataset.from_list(tiny_rows(4))}


def own_rows_after_a_look(settings):
    for name in ("name", "config", "train_split", "test_split", "streaming"):
        getattr(settings.script, f"dataset_{name}")
    return own_rows(settings)


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["--dataset_name", "no/such"], "dataset_name='no/such'"),
        (["--dataset_config", "main"], "dataset_config='main'"),
        (["--dataset_train_split", "validation"], "dataset_train_split='validation'"),
        (["--dataset_test_split", "validation"], "dataset_test_split='validation'"),
        (["--dataset_streaming"], "dataset_streaming=True"),
    ],
)
def test_a_data_set_that_a_recipe_does_not_read_is_refused(argv, field, tmp_path):
    settings = parse({"output_dir": str(tmp_path)}, argv)
    with pytest.raises(ValueError, match=rf"{field} has no effect: this recipe's load_data"):
        recipe_data(own_rows, settings)
    assert len(recipe_data(own_rows_after_a_look, settings)["train"]) == 4
    assert len(recipe_data(own_rows, parse({"output_dir": str(tmp_path)}, []))["train"]) == 4


def test_what_goes_with_the_recipes_data_set_goes_with_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(4)))
    defaults = {"dataset_name": "openai/gsm8k", "dataset_config": "main", "dataset_test_split": "validation"}
    argv = ["--output_dir", str(tmp_path), "--dataset_name", str(tmp_path / "rows.jsonl")]
    assert len(recipe_data(dataset_by_name, parse(defaults, argv))["train"]) == 4
    for flag, value in (("--dataset_config", "main"), ("--dataset_test_split", "validation")):
        with pytest.raises(ValueError, match=f"{flag[2:]}='{value}'"):
            recipe_data(dataset_by_name, parse(defaults, [*argv, flag, value]))


@pytest.mark.parametrize("name", ["gkd_glass", "gkd_smollm2"])
def test_the_demos_hold_out_prompts_and_refuse_a_data_set(name, tmp_path):
    recipe = runpy.run_path(str(RECIPES / f"{name}.py"), run_name="recipe")
    data = recipe["load_data"](None)
    held_out = data.get("eval") or data["prompts"]
    assert len(held_out) == (256 if name == "gkd_glass" else 64)
    assert not set(map(prompt_key, data["train"])) & set(map(prompt_key, held_out))
    settings = parse({"output_dir": str(tmp_path)}, ["--dataset_name", "no_such_dataset_at_all"])
    with pytest.raises(ValueError, match="dataset_name='no_such_dataset_at_all' has no effect"):
        recipe_data(recipe["load_data"], settings)
