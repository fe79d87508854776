"""Lengths, what is dropped or cut and how it is reported."""

import re

import pytest
from prepared import (
    ANSWER,
    ANSWER_TEXT,
    GOOD,
    PROMPT_TEXT,
    THREE_TURNS,
    TOKENIZER,
    USER,
    ids,
    one,
    prepare,
    tokenizer_with_bos,
)
from tiny import CHATML, tiny_rows, tiny_tokenizer

from gkd.data.sequences import PaddingCollator, prompt_of

# ---------------------------------------------------------------------------------------------------------- lengths

LONG = [
    {"messages": [{**USER, "content": "x" * n}, {**ANSWER, "content": "y" * m}]} for n, m in [(1, 1), (30, 2), (2, 40)]
]
FRAME = len(ids(PROMPT_TEXT)) - len("How many?")  # prompt tokens beside the question


def test_overlong_prompts_are_dropped_and_named():
    rows, report = prepare(LONG, max_prompt_length=FRAME + 2)
    assert rows["row"] == [0, 2]
    assert (report.rows, report.kept, report.dropped, report.rows_with) == (3, 2, 1, {"prompt_too_long": [1]})
    assert f"1 dropped: the prompt is longer than max_prompt_length={FRAME + 2}: row 1" in str(report)


@pytest.mark.parametrize("side", ["keep_start", "keep_end"])
def test_overlong_prompts_are_cut_at_the_stated_side(side):
    whole = one(LONG[1])
    length = whole["prompt_length"]
    rows, report = prepare(LONG, max_prompt_length=length - 5, overlong_prompt=side)
    kept = whole["input_ids"][:length][: length - 5] if side == "keep_start" else whole["input_ids"][:length][5:]
    answer = whole["input_ids"][length:]
    assert rows[1]["input_ids"] == kept + answer
    assert rows[1]["labels"] == [-100] * len(kept) + answer
    assert rows[1]["prompt_length"] == len(kept)
    assert report.rows_with == {"prompt_cut": [1]}


@pytest.mark.parametrize("side", ["drop", "keep_start", "keep_end"])
def test_a_prompt_that_is_no_prefix_is_held_to_the_limit_too(side):
    """The prompt alone ends with <think>, its row goes on otherwise; the row's beginning is the shorter one."""
    tokenizer = tiny_tokenizer(chat_template=CHATML.replace("assistant\n'", "assistant\n<think>'"))
    whole, good = one(GOOD, tokenizer), {"messages": [{**USER, "content": "?"}, ANSWER]}
    served, limit = prompt_of(whole), whole["prompt_length"] + 2
    rows, report = prepare([GOOD, good], tokenizer, max_prompt_length=limit, overlong_prompt=side)
    assert report.longest_prompt <= limit < len(served)
    if side == "drop":
        assert report.rows_with["prompt_too_long"] == [0]
        return
    assert prompt_of(rows[0]) == (served[:limit] if side == "keep_start" else served[-limit:])
    assert rows[0]["labels"] == whole["labels"]
    assert report.rows_with["prompt_cut"] == [0]


def test_keep_end_keeps_the_bos():
    tokenizer = tokenizer_with_bos(None)
    row = {"prompt": "abcdef", "completion": "g"}
    prepared = one(row, tokenizer, max_prompt_length=3, overlong_prompt="keep_end")
    assert prepared["input_ids"] == [256, *ids("ef", TOKENIZER), *ids("g", TOKENIZER), 258]


@pytest.mark.parametrize("side", ["keep_start", "keep_end"])
def test_cut_prompts_keep_the_labels_of_what_is_left_of_them(side):
    whole = one({"messages": THREE_TURNS}, assistant_turns="all")
    limit = whole["prompt_length"] - 7
    cut = one({"messages": THREE_TURNS}, assistant_turns="all", max_prompt_length=limit, overlong_prompt=side)
    for i, label in zip(cut["input_ids"], cut["labels"], strict=True):
        assert label in (-100, i)
    gone = slice(limit, limit + 7) if side == "keep_start" else slice(0, 7)
    expected = list(whole["labels"])
    del expected[gone]
    assert cut["labels"] == expected


def test_overlong_rows_are_cut_at_the_end_of_the_answer_or_dropped():
    limit = FRAME + 2 + 10
    rows, report = prepare(LONG, max_length=limit)
    assert rows["row"] == [0, 2]  # row 1 has a prompt that leaves no room for an answer
    assert rows[1]["input_ids"] == one(LONG[2])["input_ids"][:limit]
    assert sum(label != -100 for label in rows[1]["labels"]) == 10
    assert report.rows_with == {"no_room": [1], "row_cut": [2]}
    rows, report = prepare(LONG, max_length=limit, overlong_row="drop")
    assert (rows["row"], report.rows_with) == ([0], {"no_room": [1], "row_too_long": [2]})


def test_one_target_is_room_enough_and_none_is_not():
    limit = one(LONG[0])["prompt_length"]
    assert prepare([LONG[0]], max_length=limit + 1)[1].target_tokens == 1
    with pytest.raises(ValueError, match=f"1 dropped: the prompt alone fills max_length={limit}: row 0"):
        prepare([LONG[0]], max_length=limit)


def test_a_row_is_dropped_for_one_reason():
    _, report = prepare(LONG, max_prompt_length=FRAME + 2, max_length=FRAME + 3)
    assert report.rows_with == {"prompt_too_long": [1], "row_cut": [2]}


def test_max_length_is_not_for_prompts_alone():
    rows, report = prepare([{"prompt": "x" * 50}], max_length=20, prompt_only_ok=True)
    assert (len(rows[0]["input_ids"]), report.rows_with) == (50, {})


def test_ten_row_numbers_are_named():
    _, report = prepare([LONG[0], *[LONG[1]] * 14], max_prompt_length=FRAME + 2)
    assert "14 dropped: the prompt is longer" in str(report)
    assert str(report).endswith("rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4 more")


def test_no_row_left_says_why():
    with pytest.raises(ValueError, match=r"no usable row is left(.|\n)*max_prompt_length=3: rows 0, 1, 2$"):
        prepare(LONG, max_prompt_length=3)


def test_report_counts_tokens():
    _, report = prepare([GOOD, {"messages": THREE_TURNS}])
    prompts = [one(row)["prompt_length"] for row in (GOOD, {"messages": THREE_TURNS})]
    assert report.target_tokens == len(ids(ANSWER_TEXT)) + len(ids("a3<|im_end|>"))
    assert report.prompt_tokens == sum(prompts)
    assert report.longest_prompt == max(prompts)
    assert report.longest_row == len(one({"messages": THREE_TURNS})["input_ids"])


def test_several_processes_number_rows_as_one_does():
    rows = tiny_rows(11)
    assert list(prepare(rows, num_proc=2)[0]) == list(prepare(rows)[0])


# --------------------------------------------------------------------------------------------------------- collator


def test_collator_pads_to_the_longest_only():
    rows, _ = prepare(tiny_rows(5))
    batch = PaddingCollator(256)(list(rows))
    assert batch["input_ids"].shape[1] == max(len(row["input_ids"]) for row in rows)


def test_report_is_logged_as_a_warning_only_when_there_is_something_to_say(caplog):
    prepare([GOOD])
    assert not caplog.records
    prepare(LONG, max_prompt_length=FRAME + 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert re.search(r"2 of 3 rows kept", caplog.text)
