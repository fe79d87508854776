"""Rows of every format become the right ids and labels; what cannot be used is refused or reported by row number."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, tiny_rows, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gkd.data import PaddingCollator, prepare_dataset

TOKENIZER = tiny_tokenizer()
USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "Three."}
PROMPT_TEXT = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
ANSWER_TEXT = "Three.<|im_end|>"


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prepare(rows, tokenizer=TOKENIZER, **options):
    options = {"max_length": None, "max_prompt_length": None, **options}
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return prepare_dataset(dataset, tokenizer, **options)


def one(row, tokenizer=TOKENIZER, **options):
    return prepare([row], tokenizer, **options)[0][0]


def parts(prepared, tokenizer=TOKENIZER):
    """The prompt's text, and the text of each run of targets."""
    runs, before = [], -100
    for label in prepared["labels"]:
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], label]] if before != -100 else [*runs, [label]]
        before = label
    prompt = prepared["input_ids"][: prepared["prompt_length"]]
    return tokenizer.decode(prompt), [tokenizer.decode(run) for run in runs]


def with_template(template, **options):
    return tiny_tokenizer(chat_template=template, **options)


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
    assert padded == {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "prompt_length": 2, "row": 0}
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

GOOD = {"messages": [USER, ANSWER]}
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
    "prompt is a number": ({"prompt": 3, "completion": "x"}, "column 'prompt': should be a list of turns, got int 3"),
    "prompt is empty": ({"prompt": "", "completion": "x"}, "column 'prompt': is empty"),
    "completion ends with user": ({"prompt": [USER], "completion": [USER]}, "column 'completion': should end with"),
    "prompt ends with the answer": ({"prompt": [USER, ANSWER]}, "put that turn into `completion`"),
    "completion is a number": ({"prompt": "x", "completion": 4}, "column 'completion': should be a list of turns"),
    "instruction is a number": ({"instruction": 3, "output": "x"}, "column 'instruction': should be text, got int 3"),
    "output is a number": ({"instruction": "a", "output": 4}, "column 'output': should be text, got int 4"),
    "system is a number": ({"system": 3, "messages": [USER, ANSWER]}, "column 'system': should be text"),
    "tools are not JSON": ({"tools": "{", "messages": [USER, ANSWER]}, "column 'tools': is text but not JSON"),
    "template kwargs are a list": ({"chat_template_kwargs": [1], **GOOD}, "'chat_template_kwargs': should be a dict"),
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


# ------------------------------------------------------------------------------------------- turns, tools, templates

THREE_TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2 <|im_end|> inside"},
    {"role": "user", "content": "u3"},
    {"role": "assistant", "content": "a3"},
]
THREE_ANSWERS = ["a1<|im_end|>", "a2 <|im_end|> inside<|im_end|>", "a3<|im_end|>"]


def test_three_turns_last_and_all():
    last, every = one({"messages": THREE_TURNS}), one({"messages": THREE_TURNS}, assistant_turns="all")
    assert parts(last)[1] == THREE_ANSWERS[-1:]
    assert parts(every)[1] == THREE_ANSWERS
    assert last["input_ids"] == every["input_ids"]
    assert last["prompt_length"] == every["prompt_length"] == len(last["input_ids"]) - len(ids("a3<|im_end|>"))


def test_assistant_turns_of_a_prompt_column_are_never_trained_on():
    row = {"prompt": THREE_TURNS[:4], "completion": THREE_TURNS[4:]}
    assert parts(one(row, assistant_turns="all"))[1] == THREE_ANSWERS[1:]


def test_a_chat_that_ends_with_the_user_is_a_prompt():
    prepared = one({"messages": THREE_TURNS[:-1]}, prompt_only_ok=True, assistant_turns="all")
    assert parts(prepared)[1] == []
    assert prepared["prompt_length"] == len(prepared["input_ids"])
    assert parts(prepared)[0].endswith("u3<|im_end|>\n<|im_start|>assistant\n")


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "owl"}}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "finds a word", "parameters": {}}}]
TOOL_CHAT = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "RESULT"}, ANSWER]
TOOL_TEMPLATE = CHATML.replace(
    "(message['content'] or '')",
    "(message['content'] or '') + (message.tool_calls | tojson if message.tool_calls else '')",
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_rendered_and_their_results_are_not_trained_on(tools):
    tokenizer = with_template(TOOL_TEMPLATE)
    row = {"messages": TOOL_CHAT, "tools": tools}
    prompt, targets = parts(one(row, tokenizer, assistant_turns="all"), tokenizer)
    assert "finds a word" in prompt
    assert "RESULT" in prompt
    assert json.loads(targets[0].removesuffix("<|im_end|>")) == [CALL]
    assert targets[1:] == [ANSWER_TEXT]
    assert parts(one(row, tokenizer), tokenizer)[1] == [ANSWER_TEXT]


def test_keys_that_arrow_fills_with_none_do_not_reach_the_template():
    tokenizer = with_template(TOOL_TEMPLATE.replace("if message.tool_calls else", "if 'tool_calls' in message else"))
    calls = [{**CALL, "function": {**CALL["function"], "arguments": {"word": "owl", "language": None}}}]
    row = {"messages": [USER, {**TOOL_CHAT[1], "tool_calls": calls}, *TOOL_CHAT[2:]], "tools": TOOLS}
    prepared = one(row, tokenizer, assistant_turns="all")
    assert "null" not in tokenizer.decode(prepared["input_ids"])
    assert json.loads(parts(prepared, tokenizer)[1][0].removesuffix("<|im_end|>")) == [CALL]


def test_an_answer_that_the_template_does_not_write_is_empty():
    with_calls = {"messages": [USER, TOOL_CHAT[1]]}
    assert prepare([with_calls, with_calls], with_template(TOOL_TEMPLATE))[1].kept == 2
    with pytest.raises(ValueError, match="2 dropped: the answer is empty: rows 0, 1"):
        prepare([with_calls, with_calls])


def test_chat_template_kwargs_reach_the_template():
    tokenizer = with_template(CHATML + "{{ 'think!' if think is defined and think and add_generation_prompt }}")
    rows = [{**GOOD, "chat_template_kwargs": {"think": think}} for think in (False, True)]
    assert parts(one(rows[0], tokenizer))[0] == PROMPT_TEXT
    row = {"messages": [USER], "chat_template_kwargs": {"think": True}}
    assert parts(one(row, tokenizer, prompt_only_ok=True))[0] == PROMPT_TEXT + "think!"


HEADER = "{{ '<|im_start|>assistant\n' }}"
ENDINGS = {
    "nothing after the answer": CHATML.replace("<|im_end|>\n' }}", "<|im_end|>' }}"),
    "a second stop token at the end": CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
    "a header after the answer": CHATML.replace("{%- if add_generation_prompt -%}", "{%- if true -%}"),
    "spaces before the stop token": CHATML.replace("<|im_end|>\n' }}", " <|im_end|>\n' }}"),
}


@pytest.mark.parametrize("template", ENDINGS.values(), ids=ENDINGS.keys())
@pytest.mark.parametrize("turns", ["last", "all"])
def test_answers_end_with_the_stop_token_and_nothing_follows(template, turns):
    tokenizer = with_template(template)
    prompt, targets = parts(one({"messages": THREE_TURNS}, tokenizer, assistant_turns=turns), tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert [target.replace(" <|im_end|>", "<|im_end|>") for target in targets] == [
        answer.replace(" <|im_end|>", "<|im_end|>")
        for answer in (THREE_ANSWERS[-1:] if turns == "last" else THREE_ANSWERS)
    ]


def test_a_template_without_end_of_turn_gets_eos_and_a_note():
    turns = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = with_template(template)
    rows, report = prepare([GOOD], tokenizer)
    assert parts(rows[0], tokenizer) == ("user: How many?\nassistant: ", ["Three.<|im_end|>"])
    assert report.rows_with == {"eos_appended": [0]}


def test_a_prompt_that_is_not_a_prefix_is_noted_and_the_answer_starts_where_they_part():
    tokenizer = with_template(CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>' }}"))
    rows, report = prepare([GOOD, {"messages": [USER, {**ANSWER, "content": "<think>so</think>3"}]}], tokenizer)
    assert parts(rows[0], tokenizer) == (PROMPT_TEXT, [ANSWER_TEXT])
    assert parts(rows[1], tokenizer) == (PROMPT_TEXT + "<think>", ["so</think>3<|im_end|>"])
    assert report.rows_with == {"prompt_not_prefix": [0]}
    assert "not a prefix" in str(report)


def test_earlier_turns_that_the_template_rewrites_are_found():
    """As in templates of thinking models: the thoughts of all turns but the last are left out."""
    tokenizer = with_template(
        CHATML.replace(
            "(message['content'] or '')",
            "(message['content'] if loop.last else message['content'].split('</think>')[-1])",
        )
    )
    chat = [
        USER,
        {**ANSWER, "content": "<think>hm</think>Two."},
        USER,
        {**ANSWER, "content": "<think>ah</think>Three."},
    ]
    rows, report = prepare([{"messages": chat}], tokenizer, assistant_turns="all")
    assert parts(rows[0], tokenizer)[1] == ["Two.<|im_end|>", "<think>ah</think>Three.<|im_end|>"]
    assert not report.rows_with


def test_an_earlier_turn_does_not_reach_over_the_next_users():
    """As in templates that close the last turn only with the stop token: where an earlier turn ends cannot be told."""
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + ('<|im_end|>' if loop.last else '.') }}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = with_template(template.replace("if loop.last", "if loop.last and m.role == 'assistant'"))
    chat = [USER, ANSWER, USER, ANSWER]
    rows, report = prepare([{"messages": chat}], tokenizer, assistant_turns="all")
    assert parts(rows[0], tokenizer) == ("user:How many?.assistant:Three..user:How many?.assistant:", [ANSWER_TEXT])
    assert report.rows_with == {"turn_not_found": [0]}


def test_an_earlier_empty_turn_is_not_trained_on():
    chat = [USER, {**ANSWER, "content": ""}, USER, ANSWER]
    rows, report = prepare([{"messages": chat}], assistant_turns="all")
    assert (parts(rows[0])[1], report.rows_with) == ([ANSWER_TEXT], {})


def test_an_earlier_turn_that_cannot_be_found_is_noted():
    template = CHATML.replace("message['role'] + '\n'", "message['role'] + messages | length | string + '\n'")
    rows, report = prepare([{"messages": THREE_TURNS}], with_template(template), assistant_turns="all")
    assert report.rows_with["turn_not_found"] == [0]
    assert parts(rows[0])[1][-1].endswith("a3<|im_end|>")


# ---------------------------------------------------------------------------------- ids: padding, stop tokens, BOS


@pytest.mark.parametrize("options", [{"pad_is_eos": True}, {"padding_side": "left"}])
def test_pad_token_and_padding_side_change_nothing(options):
    rows = tiny_rows(8)
    assert list(prepare(rows)[0]) == list(prepare(rows, tiny_tokenizer(**options))[0])


def test_padding_and_truncation_set_on_the_tokenizer_change_nothing():
    tokenizer = tiny_tokenizer()
    tokenizer(["a", "bcd"], padding="max_length", max_length=5, truncation=True)
    assert list(prepare(tiny_rows(4), tokenizer)[0]) == list(prepare(tiny_rows(4))[0])


def test_stop_and_pad_tokens_inside_prompt_and_answer_stay():
    text = "a<|im_end|>b<|endoftext|>c"
    row = {"messages": [{**USER, "content": text}, {**ANSWER, "content": text}]}
    prompt, targets = parts(one(row, tiny_tokenizer(pad_is_eos=True)))
    assert prompt == PROMPT_TEXT.replace("How many?", text)
    assert targets == [text + "<|im_end|>"]


def tokenizer_with_bos(template):
    """Adds <|endoftext|> as BOS, and an eos, whenever it is asked for special tokens."""
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 256), ("<|im_end|>", 258)]
    )
    assert tokenizer("a")["input_ids"] == [256, 64, 258]
    return tokenizer


@pytest.mark.parametrize(
    "row",
    [GOOD, {"prompt": "How many?", "completion": "Three."}, {"prompt": "<|endoftext|>How many?", "completion": "3"}],
    ids=["chat", "text", "text with a BOS of its own"],
)
def test_exactly_one_bos(row):
    prepared = one(row, tokenizer_with_bos("{{ bos_token }}" + CHATML))
    assert prepared["input_ids"][0] == 256
    assert prepared["input_ids"].count(256) == 1
    assert prepared["input_ids"][-1] == prepared["labels"][-1] == 258
    assert 258 not in prepared["input_ids"][-2:-1]


def test_a_prompt_alone_has_no_eos_behind_it():
    prepared = one({"prompt": "a"}, tokenizer_with_bos(None), prompt_only_ok=True)
    assert prepared["input_ids"] == [256, 64]


def merging_tokenizer(metaspace):
    vocab = {token: i for i, token in enumerate(["▁", "Ġ", "a", "b", "c", "ab", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    if metaspace:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_no_token_is_merged_across_the_border_of_prompt_and_answer():
    tokenizer = merging_tokenizer(metaspace=False)
    rows, report = prepare([{"prompt": "ca", "completion": "bc"}], tokenizer)
    # "ca" + "bc" is c, ab, c as one text; a rollout starts from c, a
    assert rows[0]["input_ids"] == tokenizer.convert_tokens_to_ids(["c", "a", "b", "c", "</s>"])
    assert (rows[0]["prompt_length"], report.rows_with) == (2, {})


def test_where_no_border_can_be_drawn_the_common_beginning_is_the_prompt():
    tokenizer = merging_tokenizer(metaspace=True)
    rows, report = prepare([{"prompt": "ca", "completion": "bc"}], tokenizer)
    # on its own the answer would begin with a space
    assert rows[0]["input_ids"] == tokenizer.convert_tokens_to_ids(["▁", "c", "ab", "c", "</s>"])
    assert (rows[0]["prompt_length"], report.rows_with) == (2, {"prompt_not_prefix": [0]})


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


def test_empty_answers_are_dropped_and_named():
    rows, report = prepare([{"prompt": "a", "completion": " "}, {"prompt": "a", "completion": "b"}])
    assert (rows["row"], report.rows_with) == ([1], {"empty_answer": [0]})
    chats = [{"messages": [USER, {**ANSWER, "content": text}]} for text in ("", "b")]
    assert prepare(chats)[1].rows_with == {"empty_answer": [0]}


def test_prompt_only_rows_are_counted_and_need_rollouts():
    rows = [{"messages": [USER]}, GOOD, {"messages": [USER]}]
    prepared, report = prepare(rows, prompt_only_ok=True)
    assert (report.kept, report.prompt_only) == (3, 2)
    assert prepared[0]["labels"] == [-100] * prepared[0]["prompt_length"]
    assert "2 of them prompts only" in str(report)
    with pytest.raises(ValueError, match=r"2 of the 3 rows of the train data set .*rows 0, 2.*lmbda=1 or seq_kd=True"):
        prepare(rows)


def test_report_counts_tokens():
    _, report = prepare([GOOD, {"messages": THREE_TURNS}])
    prompts = [one(row)["prompt_length"] for row in (GOOD, {"messages": THREE_TURNS})]
    assert report.target_tokens == len(ids(ANSWER_TEXT)) + len(ids("a3<|im_end|>"))
    assert report.prompt_tokens == sum(prompts)
    assert report.longest_prompt == max(prompts)
    assert report.longest_row == len(one({"messages": THREE_TURNS})["input_ids"])


text = st.text(
    alphabet=st.characters(codec="utf-8", exclude_characters="<|>", exclude_categories=("Cs",)), max_size=12
)
answers = text.filter(lambda t: t.strip())


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(text, answers), min_size=1, max_size=4), pad_is_eos=st.booleans(), every=st.booleans())
def test_targets_are_exactly_the_answers_with_their_stop_tokens(pairs, pad_is_eos, every):
    messages = [m for u, a in pairs for m in ({**USER, "content": u}, {**ANSWER, "content": a})]
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
    rows, report = prepare([{"messages": messages}], tokenizer, assistant_turns="all" if every else "last")
    trained = [a for _, a in pairs] if every else [pairs[-1][1]]
    assert report.target_tokens == sum(len(a.encode()) + 1 for a in trained)
    assert [label for label in rows[0]["labels"] if label != -100] == [i for a in trained for i in [*ids(a), 258]]
    padded = PaddingCollator(tokenizer.pad_token_id)([rows[0], {**rows[0], "input_ids": [1], "labels": [-100]}])
    assert int((padded["labels"] != -100).sum()) == report.target_tokens


def test_several_processes_number_rows_as_one_does():
    rows = tiny_rows(11)
    assert list(prepare(rows, num_proc=2)[0]) == list(prepare(rows)[0])


# --------------------------------------------------------------------------------------------------------- collator


def test_collator_pads_on_the_right_and_masks_by_length():
    features = [
        {"input_ids": [1, 258, 3], "labels": [-100, 258, 3], "prompt_length": 1, "row": 7},
        {"input_ids": [258], "labels": [-100], "prompt_length": 1, "row": 2},
    ]
    batch = PaddingCollator(pad_id=258, pad_to_multiple_of=4)(features)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 258, 3, 258], [258, 258, 258, 258]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
        "labels": [[-100, 258, 3, -100], [-100, -100, -100, -100]],
        "prompt_lengths": [1, 1],
        "rows": [7, 2],
    }
    assert all(str(value.dtype) == "torch.int64" for value in batch.values())


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
