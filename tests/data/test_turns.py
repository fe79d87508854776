"""Turns in every spelling: calls, flags, chats as JSON text; whatever is said in two ways gives the same targets."""

import json

import pytest
from prepared import ANSWER, ANSWER_TEXT, GOOD, PROMPT_TEXT, USER, one, parts, prepare, with_template

CALLING = (
    "{%- if tools %}{{ tools | tojson }}{% endif -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{%- for c in m.tool_calls or [] -%}{{ '[' + c.function.name + ' ' + (c.function.arguments | tojson) + ']' }}"
    "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
ARGUMENTS = {"city": "Oslo", "days": None}
FUNCTION = {"name": "rain", "arguments": ARGUMENTS}
AS_TEXT = {"name": "rain", "arguments": json.dumps(ARGUMENTS)}
CALLS = {
    "text": {"tool_calls": [{"type": "function", "function": AS_TEXT}]},
    "all of it text": {"tool_calls": json.dumps([{"type": "function", "function": FUNCTION}])},
    "older form": {"function_call": AS_TEXT},
    "older form as text": {"function_call": json.dumps(FUNCTION)},
}


def call_rows():
    for name, call in CALLS.items():
        yield name, {"messages": [USER, {"role": "assistant", "content": None, **call}]}
        yield f"{name}, empty content", {"messages": [USER, {"role": "assistant", "content": "", **call}]}
    whole = [USER, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": FUNCTION}]}]
    yield "the chat as text", {"messages": json.dumps(whole)}
    for role in ("function_call", "tool_call"):
        turns = [{"from": "human", "value": USER["content"]}, {"from": role, "value": json.dumps(FUNCTION)}]
        yield role, {"conversations": turns}
    yield "prompt and completion", {"prompt": json.dumps(whole[:1]), "completion": json.dumps(whole[1:])}


@pytest.mark.parametrize("row", dict(call_rows()).values(), ids=dict(call_rows()).keys())
def test_a_call_in_every_form_is_the_same_call_with_the_nulls_that_the_user_wrote(row):
    prepared = one(row, with_template(CALLING))
    assert parts(prepared) == (PROMPT_TEXT, ['[rain {"city": "Oslo", "days": null}]<|im_end|>'])


def test_arguments_that_are_no_json_object_stay_as_they_are():
    call = {"type": "function", "function": {"name": "python", "arguments": "print(1)"}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert parts(one(row, with_template(CALLING)))[1] == ['[python "print(1)"]<|im_end|>']


def test_an_older_call_and_what_answers_it():
    turns = [USER, {"role": "assistant", "content": None, "function_call": AS_TEXT}]
    turns += [{"role": "function", "name": "rain", "content": "no"}, ANSWER]
    row = {"messages": turns, "functions": [{"name": "rain", "parameters": {"type": "object"}}]}
    prompt, answers = parts(one(row, with_template(CALLING), assistant_turns="all"))
    assert prompt.startswith('[{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]')
    assert "<|im_start|>tool\nno<|im_end|>" in prompt
    assert answers == ['[rain {"city": "Oslo", "days": null}]<|im_end|>', ANSWER_TEXT]


def test_calls_one_behind_another_are_one_turn():
    turns = [("human", "?"), ("tool_call", json.dumps(FUNCTION)), ("tool_call", json.dumps(FUNCTION))]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    call = '[rain {"city": "Oslo", "days": null}]'
    assert parts(one(row, with_template(CALLING), assistant_turns="all"))[1] == [f"{call}{call}<|im_end|>"]


def test_nulls_of_a_schema_are_kept_where_the_user_wrote_them_and_taken_out_where_arrow_put_them():
    schema = [{"name": "book", "parameters": {"seat": {"default": None}}}]
    template = with_template(CALLING)
    served = template.apply_chat_template([USER], tools=schema, add_generation_prompt=True, tokenize=False)
    assert parts(one({**GOOD, "tools": json.dumps(schema)}, template))[0] == served
    rows = [{**GOOD, "tools": [{"name": "a", "x": 1}]}, {**GOOD, "tools": [{"name": "b", "y": 2}]}]
    assert parts(prepare(rows, template)[0][1])[0].startswith('[{"name": "b", "y": 2}]')


# ------------------------------------------------------------------------------------------------------------- flags

FLAGS = ("weight", "trainable", "loss_mask", "loss", "train", "training")


def corrected(flag, wrong=False, right=None):
    """A wrong answer, flagged, and the right one."""
    turns = [USER, {**ANSWER, "content": "Wrong."}, {**USER, "content": "No."}, {**ANSWER}]
    for i, value in ((1, wrong), (3, right)):
        turns[i] |= {} if value is None else {flag: value}
    return {"messages": turns}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_a_turn_that_is_flagged_is_not_trained_on(flag, value):
    prepared, report = prepare([corrected(flag, value, type(value)(1))], assistant_turns="all")
    prompt, answers = parts(prepared[0])
    assert answers == [ANSWER_TEXT]
    assert "Wrong." in prompt
    assert report.rows_with == {}


def test_a_last_turn_that_is_flagged():
    row = corrected("weight", wrong=1, right=0)
    prepared = one(row, assistant_turns="all")
    assert parts(prepared)[1] == ["Wrong.<|im_end|>"]
    _, report = prepare([row, GOOD])  # only the last turn is asked for
    assert (report.kept, report.rows_with) == (1, {"untrained": [0]})


def test_flags_that_cannot_be_honoured_are_named():
    for value in (0.5, "no", 2, [0, 1]):
        with pytest.raises(ValueError, match=r"row 0, column 'messages': turn 1 has .* as its 'weight'"):
            one(corrected("weight", value))
    turns = [USER, {**ANSWER, "train": True, "weight": 0}]
    with pytest.raises(ValueError, match="turn 1 is to be trained on by one of weight, train and not by another"):
        one({"messages": turns})
    asked = {"messages": [{**USER, "train": True}, ANSWER]}
    before = {"prompt": [USER, {**ANSWER, "train": True}, USER], "completion": [ANSWER]}
    for row in (asked, before):
        assert prepare([row], assistant_turns="all")[1].rows_with == {"flag_not_honoured": [0]}


# ------------------------------------------------------------------------------------------- said twice, said as text

HELPFUL = {"role": "system", "content": "Help."}


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([USER], [USER, ANSWER]),
        (USER["content"], [USER, ANSWER]),
        ([USER, ANSWER, USER], [USER, ANSWER, USER, ANSWER]),
        ([USER], [HELPFUL, USER, ANSWER]),
        ([HELPFUL, USER], [USER, ANSWER]),
        ([HELPFUL, USER], [HELPFUL, USER, ANSWER]),
    ],
)
def test_a_prompt_that_the_completion_repeats_is_asked_once(prompt, completion):
    systems = [HELPFUL] if HELPFUL in [*prompt, *completion] else []
    history = [turn for turn in prompt if turn != HELPFUL] if isinstance(prompt, list) else [USER]
    prepared, report = prepare([{"prompt": prompt, "completion": completion}], assistant_turns="all")
    once = one({"prompt": [*systems, *history], "completion": [ANSWER]}, assistant_turns="all")
    assert prepared[0] == once
    assert report.rows_with == {"prompt_repeated": [0]}


def test_a_text_that_begins_with_its_prompt_is_told():
    question = "Which country has the shape of a boot?"
    rows = [{"prompt": question, "completion": f"{question} Italy."}, {"prompt": "ha", "completion": "ha ha"}]
    assert prepare(rows)[1].rows_with == {"prompt_twice": [0]}


def test_chats_as_json_text():
    sharegpt = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": ANSWER["content"]}]
    for row in (
        {"messages": json.dumps([USER, ANSWER])},
        {"conversations": json.dumps(sharegpt)},
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        {"prompt": json.dumps(sharegpt[:1]), "completion": ANSWER["content"]},
    ):
        assert parts(one(row)) == (PROMPT_TEXT, [ANSWER_TEXT])
    with pytest.raises(ValueError, match="row 0, column 'messages': is text but not JSON"):
        one({"messages": '[{"role": "user"'})
    # text that only looks like JSON is text, and an answer may be a chat that somebody asked for
    plain = {"prompt": "[1, 2, 3] has", "completion": json.dumps([USER])}
    assert parts(one(plain)) == (plain["prompt"], [plain["completion"] + "<|im_end|>"])


def test_the_rounds_before_an_instruction():
    row = {"instruction": "And two?", "output": "Six.", "history": [["How many?", "Three."]], "system": "Count."}
    turns = [{"role": "system", "content": "Count."}, USER, ANSWER, {**USER, "content": "And two?"}]
    assert one(row) == one({"messages": [*turns, {**ANSWER, "content": "Six."}]})
    plain = parts(one(row, with_template(None)))
    asked = "### Instruction:\n{}\n\n### Response:\n".format
    assert plain == (f"Count.\n\n{asked('How many?')}Three.\n\n{asked('And two?')}", ["Six.<|im_end|>"])
    assert one({**row, "history": json.dumps(row["history"])}) == one(row)
    with pytest.raises(ValueError, match="column 'history': should hold pairs of question and answer"):
        one({**row, "history": [["How many?"]]})


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({**ANSWER, "value": "Four."}, "turn 1 has 'value' beside its content, and it says something else"),
        ({**ANSWER, "from": "human"}, "turn 1 has the role 'assistant' and, as 'from', 'human'"),
        ({**ANSWER, "tool_calls": [{"id": "1"}]}, "turn 1 has a call in 'tool_calls' without a name"),
        ({**ANSWER, "tool_calls": 3}, "turn 1 has int 3 as its 'tool_calls'"),
        ({**ANSWER, "function_call": "{"}, "is text but not JSON"),
        ({"from": "function_call", "value": "rain"}, "is text but not JSON"),
        ({**ANSWER, "content": [{"type": "image", "text": "a cat"}]}, "turn 1 has a part that is not text"),
        ({**ANSWER, "content": [{"type": "text", "text": "a", "url": "b"}]}, "more in it, which nothing reads: url"),
    ],
)
def test_turns_that_say_what_nobody_reads_are_refused(turn, problem):
    with pytest.raises(ValueError, match=problem) as error:
        one({"messages": json.dumps([USER, turn])})
    assert "train data set, row 0, column 'messages'" in str(error.value)


def test_both_spellings_of_one_turn_may_agree():
    turns = [{**USER, "from": "human", "value": USER["content"]}, {**ANSWER, "from": "gpt", "value": None}]
    assert parts(one({"messages": turns})) == (PROMPT_TEXT, [ANSWER_TEXT])
