"""Rows of every format become the same ids; malformed ones are refused by row number and column."""

import pytest
from datasets import Dataset, DatasetDict
from prepared import ANSWER, ANSWER_TEXT, GOOD, PROMPT_TEXT, TOKENIZER, USER, ids, one, parts, prepare, with_template
from tiny import tiny_rows

from gkd.data.prepare import prepare_dataset

# ---------------------------------------------------------------------------------------------------------- formats

SAME_CHAT = {
    "messages": {"messages": [USER, ANSWER]},
    "messages in parts": {
        "messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (USER, ANSWER)]
    },
    "ShareGPT": {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Three."}]},
    "conversations with roles": {"conversations": [USER, ANSWER]},
    "prompt and completion": {"prompt": [USER], "completion": [ANSWER]},
    "completion as text": {"prompt": [USER], "completion": "Three."},
    "prompt as text, completion as a turn": {"prompt": "How many?", "completion": [ANSWER]},
    "Alpaca": {"instruction": "How many?", "input": "", "output": "Three."},
    "Alpaca without input": {"instruction": "How many?", "output": "Three."},
    "Dolly": {"instruction": "How many?", "context": "", "response": "Three.", "category": "qa"},
    "another column is None": {"messages": None, "prompt": [USER], "completion": [ANSWER]},
}


@pytest.mark.parametrize("row", SAME_CHAT.values(), ids=SAME_CHAT.keys())
def test_one_chat_in_every_format_gives_the_same_ids(row):
    prepared = one(row)
    prompt, answer = ids(PROMPT_TEXT), ids(ANSWER_TEXT)
    assert prepared == {
        "input_ids": prompt + answer,
        "labels": [-100] * len(prompt) + answer,
        "prompt_length": len(prompt),
        "prompt_ids": [],
        "row": 0,
    }


def test_plain_text_gets_eos_once_and_no_template():
    assert parts(one({"prompt": "Count: one,", "completion": " two"})) == ("Count: one,", [" two<|im_end|>"])
    assert parts(one({"prompt": "Count: one,", "completion": " two<|im_end|>"})) == ("Count: one,", [" two<|im_end|>"])


def test_text_that_was_rendered_before_is_closed_like_a_chat():
    assert parts(one({"prompt": PROMPT_TEXT, "completion": ANSWER_TEXT + "\n"})) == (PROMPT_TEXT, [ANSWER_TEXT])


def test_alpaca_input_follows_the_instruction():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert parts(one(row))[0] == "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n"
    plain = parts(one(row, with_template(None)))
    assert plain == ("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", ["3<|im_end|>"])


def test_system_column_leads_a_chat_that_has_no_system_turn():
    with_system = one({"system": "Be brief.", "messages": [USER, ANSWER]})
    assert parts(with_system)[0] == "<|im_start|>system\nBe brief.<|im_end|>\n" + PROMPT_TEXT
    own = [{"role": "system", "content": "Own."}, USER, ANSWER]
    assert "Be brief." not in parts(one({"system": "Be brief.", "messages": own}))[0]


def test_token_rows_pass_through_and_preparing_twice_changes_nothing():
    rows, _ = prepare(tiny_rows(6), assistant_turns="all")
    again, report = prepare(rows)
    assert list(again) == list(rows)
    assert report.kept == 6


def test_token_rows_with_masks():
    row = {"input_ids": [256, 256, 1, 2, 3, 4, 198], "completion_mask": [0, 0, 0, 0, 1, 1, 0]}
    padded = one({**row, "attention_mask": [0, 0, 1, 1, 1, 1, 1]})
    # left padding is taken out; ids after the last target cannot matter and go
    assert padded == {
        "input_ids": [1, 2, 3, 4],
        "labels": [-100, -100, 3, 4],
        "prompt_length": 2,
        "prompt_ids": [],
        "row": 0,
    }
    assert one({"input_ids": [1, 2]}, prompt_only_ok=True)["labels"] == [-100, -100]


def test_formatting_func_may_return_a_row_or_text():
    row = {"q": "How many?", "a": "Three."}
    as_row = one(row, formatting_func=lambda r: {"prompt": r["q"], "completion": r["a"]})
    assert parts(as_row) == ("How many?", ["Three.<|im_end|>"])
    text = {"formatting_func": lambda r: f"{r['q']} {r['a']}"}
    as_text = one(row, prompts_needed=False, **text)
    assert (as_text["prompt_length"], parts(as_text)[1]) == (0, ["How many? Three.<|im_end|>"])
    with pytest.raises(ValueError, match=r"row 0, column 'text': running text has no prompt.*lmbda=0"):
        one(row, **text)
    with pytest.raises(ValueError, match="formatting_func returned list for row 0"):
        one(row, formatting_func=lambda r: [r["q"]])


def test_running_text_is_all_target_where_no_prompt_is_needed():
    assert parts(one({"text": "once upon"}, prompts_needed=False)) == ("", ["once upon<|im_end|>"])


# -------------------------------------------------------------------------------------------------------- malformed

MALFORMED = {
    "not a list": ({"messages": "hello"}, "column 'messages': should be a list of turns, got str 'hello'"),
    "no turns": ({"messages": []}, "column 'messages': has no turns"),
    "None": ({"messages": None}, "column 'messages': is None"),
    "turn is text": ({"messages": ["hello"]}, "turn 0 should be a dict"),
    "unknown role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        "unknown role 'narrator'; known are system",
    ),
    "unknown from": ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown from 'alien'"),
    "no role": ({"messages": [{"content": "x"}]}, "turn 0 has the unknown role None"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, r"turn 1 \(assistant\) has no 'content'"),
    "content is a number": ({"messages": [{"role": "user", "content": 4}]}, "has int 4 as its 'content'"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "turn 0 has a part that is not text",
    ),
    "answer only": ({"messages": [ANSWER]}, "holds an answer only"),
    "prompt is a number": (
        {"prompt": 3, "completion": "x"},
        "column 'prompt': should be text or a list of turns, got int 3",
    ),
    "prompt is empty": ({"prompt": "", "completion": "x"}, "column 'prompt': is empty"),
    "completion ends with user": ({"prompt": [USER], "completion": [USER]}, "column 'completion': should end with"),
    "prompt ends with the answer": ({"prompt": [USER, ANSWER]}, "put that turn into `completion`"),
    "completion is a number": (
        {"prompt": "x", "completion": 4},
        "column 'completion': should be text or a list of turns, got int 4",
    ),
    "instruction is a number": ({"instruction": 3, "output": "x"}, "column 'instruction': should be text, got int 3"),
    "output is a number": ({"instruction": "a", "output": 4}, "column 'output': should be text, got int 4"),
    "system is a number": ({"system": 3, "messages": [USER, ANSWER]}, "column 'system': should be text"),
    "tools are not JSON": ({"tools": "{", "messages": [USER, ANSWER]}, "column 'tools': is text but not JSON"),
    "template kwargs are a list": ({"chat_template_kwargs": [1], **GOOD}, "'chat_template_kwargs': should be a dict"),
    "its own template": ({"chat_template_kwargs": {"chat_template": "x"}, **GOOD}, "may not set chat_template"),
    "its own rendering": (
        {"chat_template_kwargs": '{"tokenizer_kwargs": {}, "return_assistant_tokens_mask": true}', **GOOD},
        "may not set return_assistant_tokens_mask, tokenizer_kwargs",
    ),
    "template kwargs of ours": ({"chat_template_kwargs": {"tokenize": True}, **GOOD}, "may not set tokenize"),
    "unknown columns": ({"question": "x", "answer": "y"}, r"no format known for the columns \['answer', 'question'\]"),
    "text": ({"text": "x"}, "column 'text': running text has no prompt"),
    "ids are text": ({"input_ids": ["a"], "labels": [1]}, "column 'input_ids': should be a list of integers"),
    "ids beyond the tokenizer": ({"input_ids": [1, 999], "labels": [-100, 999]}, "holds the id 999"),
    "labels are shifted": ({"input_ids": [1, 2, 3], "labels": [-100, 3, -100]}, "entry 1 is neither -100"),
    "labels are short": ({"input_ids": [1, 2], "labels": [2]}, "column 'labels': has 1 entries for 2 input_ids"),
    "labels start at once": ({"input_ids": [1, 2], "labels": [1, 2]}, "has no prompt"),
    "prompt_length is beyond": ({"input_ids": [1, 2], "labels": [-100, 2], "prompt_length": 9}, "'prompt_length'"),
}


@pytest.mark.parametrize(("row", "problem"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_row_is_named(row, problem):
    with pytest.raises(ValueError, match=problem) as error:
        one(row, name="held-out", prompt_only_ok=True)
    assert "held-out data set, row 0" in str(error.value)


def test_the_number_of_the_malformed_row_is_its_own():
    rows = [GOOD] * 1500 + [{"messages": []}] + [GOOD]
    with pytest.raises(ValueError, match="row 1500, column 'messages'"):
        prepare(rows)


def test_data_sets_of_other_kinds_are_refused():
    rows = Dataset.from_list([GOOD])
    for wrong, problem in [
        (DatasetDict(train=rows, test=rows), r"dict of splits \(train, test\)"),
        (rows.to_iterable_dataset(), "is streamed.*Dataset.from_list"),
        ([GOOD], "got list: use Dataset.from_list"),
        (Dataset.from_list([]), "is empty"),
    ]:
        with pytest.raises(ValueError, match=problem):
            prepare_dataset(wrong, TOKENIZER, max_length=None, max_prompt_length=None)


def test_options_are_checked():
    for options, problem in [
        ({"assistant_turns": "first"}, "assistant_turns='first'"),
        ({"overlong_prompt": "cut"}, "overlong_prompt='cut'"),
        ({"overlong_row": "keep"}, "overlong_row='keep'"),
        ({"max_length": 0}, "max_length=0"),
    ]:
        with pytest.raises(ValueError, match=problem):
            one(GOOD, **options)


def test_a_chat_needs_a_chat_template():
    with pytest.raises(ValueError, match="row 0 is a chat, but the tokenizer has no chat template"):
        one(GOOD, with_template(None))


def test_what_the_template_refuses_is_named():
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ValueError, match="row 0: the chat template cannot render the roles user: roles must alternate"
    ):
        one(GOOD, tokenizer)
