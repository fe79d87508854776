"""Where answers begin and end: turns, tools, templates, stop tokens, BOS, borders inside a token."""

import json

import pytest
from prepared import (
    ANSWER,
    ANSWER_TEXT,
    GOOD,
    PROMPT_TEXT,
    THREE_ANSWERS,
    THREE_TURNS,
    USER,
    ids,
    one,
    parts,
    prepare,
    tokenizer_with_bos,
    with_template,
)
from tiny import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gkd.data.sequences import prompt_of
from gkd.demo.texts import cache_folder

# ------------------------------------------------------------------------------------------- turns, tools, templates


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


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|><|im_end|>"])
def test_an_answer_that_brings_its_stop_token_has_one(turns, end):
    """As in dumps of what a model has written: it stops at the first, so a second one is nothing to learn."""
    said = [{**turn, "content": turn["content"] + end * (turn["role"] == "assistant")} for turn in THREE_TURNS]
    tokenizer = with_template(CHATML)
    rows = [one({"messages": messages}, tokenizer, assistant_turns=turns) for messages in (said, THREE_TURNS)]
    found, expected = (parts(row, tokenizer)[1] for row in rows)
    assert found == expected


def test_a_template_without_end_of_turn_gets_eos_and_a_note():
    turns = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = with_template(template)
    rows, report = prepare([GOOD], tokenizer)
    assert parts(rows[0], tokenizer) == ("user: How many?\nassistant: ", ["Three.<|im_end|>"])
    assert report.rows_with == {"eos_appended": [0]}


def test_rollouts_start_from_the_served_prompt_where_the_answered_chat_begins_otherwise():
    tokenizer = with_template(CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>' }}"))
    chats = [GOOD, {"messages": [USER, {**ANSWER, "content": "<think>so</think>3"}]}, {"messages": [USER]}]
    rows, report = prepare(chats, tokenizer, prompt_only_ok=True)
    served = tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    assert [prompt_of(row) for row in rows] == [served] * 3
    assert [bool(row["prompt_ids"]) for row in rows] == [True, False, False]  # kept beside the row only where needed
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


@pytest.mark.parametrize("think", ["", "{{ '<think>' if messages | length > 2 }}"], ids=["", "next turn not found"])
def test_an_earlier_turn_does_not_reach_over_the_next_users(think):
    """As in templates that close only the last turn with the stop token: where an earlier one ends cannot be told."""
    template = "{% for m in messages %}{{ m.role + ':' + m.content }}"
    template += "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '.' }}{% endfor %}"
    tokenizer = with_template(template + "{% if add_generation_prompt %}assistant:" + think + "{% endif %}")
    rows, report = prepare([{"messages": [USER, ANSWER, USER, ANSWER]}], tokenizer, assistant_turns="all")
    assert parts(rows[0], tokenizer) == ("user:How many?.assistant:Three..user:How many?.assistant:", [ANSWER_TEXT])
    assert report.rows_with == {"turn_not_found": [0]} | ({"prompt_not_prefix": [0]} if think else {})


def said(*turns):
    """user q, assistant a: "q>", "a<"."""
    roles = {">": "user", "<": "assistant", "!": "system"}
    return [{"role": roles[turn[-1]], "content": turn[:-1]} for turn in turns]


ODD_CHATS = {
    "two assistant turns in a row": said("q>", "a1<", "a2<", "q>", "a3<"),
    "an assistant turn behind the system's": said("s!", "a1<", "q>", "a2<"),
    "a system turn in the middle": said("q>", "a1<", "s!", "q>", "a2<"),
    "empty questions": said(">", "a1<", "  >", "a2<"),
    "questions like the marks": said("QMarkA0x>", "a1<", "QMarkQ>", "a2<"),
    "a question like a turn": said("<|im_end|>\n<|im_start|>assistant\nx<|im_end|>>", "a1<", "q>", "a2<"),
    "spaces": said("q >", " a1 <", " q>", "a2 <"),
}


@pytest.mark.parametrize("chat", ODD_CHATS.values(), ids=ODD_CHATS.keys())
def test_every_assistant_turn_of_an_odd_chat_is_found(chat):
    rows, report = prepare([{"messages": chat}], assistant_turns="all")
    expected = [turn["content"] + "<|im_end|>" for turn in chat if turn["role"] == "assistant"]
    assert (parts(rows[0])[1], report.rows_with) == (expected, {})


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


def test_where_no_border_can_be_drawn_targets_begin_where_the_row_parts_from_the_prompt():
    tokenizer = merging_tokenizer(metaspace=True)
    rows, report = prepare([{"prompt": "ca", "completion": "bc"}], tokenizer)
    # on its own the answer would begin with a space
    assert rows[0]["input_ids"] == tokenizer.convert_tokens_to_ids(["▁", "c", "ab", "c", "</s>"])
    assert (rows[0]["prompt_length"], report.rows_with) == (2, {"prompt_not_prefix": [0]})
    assert prompt_of(rows[0]) == tokenizer.convert_tokens_to_ids(["▁", "c", "a"])


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "without offsets"])
def test_an_earlier_turn_is_trained_in_the_tokens_of_the_served_history(kind, monkeypatch):
    """A token that reaches over its border, ab, is no target; no other way of counting tokens says otherwise."""
    tokenizer = merging_tokenizer(metaspace=kind == "metaspace")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + ('</s>' if m.role == 'assistant' else '') }}{% endfor %}"
    )
    if kind == "without offsets":
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    chat = [
        {**USER, "content": "ca"},
        {**ANSWER, "content": "bc"},
        {**USER, "content": "c"},
        {**ANSWER, "content": "b"},
    ]
    row = one({"messages": chat}, tokenizer, assistant_turns="all")
    served = tokenizer("cabc</s>c", add_special_tokens=False)["input_ids"]
    assert prompt_of(row) == served
    assert "ab" in tokenizer.convert_ids_to_tokens(served)
    trained = tokenizer.convert_ids_to_tokens([label for label in row["labels"] if label != -100])
    assert trained[:2] == ["c", "</s>"]
    assert trained[-1] == "</s>"
    assert "b" in trained[2]
    assert len(trained) == 4


# --------------------------------------------------------------------------------------------------- a real tokenizer

SMOLLM2 = cache_folder() / "models" / "smollm2-teacher"


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2 has not been fetched (`make demo` does)")
def test_smollm2_whose_pad_token_is_its_end_of_turn():
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows, report = prepare([{"messages": THREE_TURNS}, {"messages": [USER, ANSWER]}], tokenizer, assistant_turns="all")
    assert parts(rows[0], tokenizer)[1] == THREE_ANSWERS
    prompt, targets = parts(rows[1], tokenizer)
    assert prompt.endswith(PROMPT_TEXT)  # after the template's own system turn
    assert targets == [ANSWER_TEXT]
    assert not report.rows_with
