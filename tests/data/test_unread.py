"""Nothing of a row is lost in silence: columns and keys that nothing reads are told, other than text is refused, a row
that cannot be used as data is a prompt where that is enough."""

import json

import pytest
from prepared import ANSWER, ANSWER_TEXT, GOOD, PROMPT_TEXT, USER, one, parts, prepare, with_template
from tiny import CHATML

# --------------------------------------------------------------------------------------------------- columns and keys

TOLD = {
    "a column": ({**GOOD, "passage": "It rained."}, ["passage"]),
    "a number": ({**GOOD, "id": 77}, ["id"]),
    "a switch": ({**GOOD, "gold": True}, ["gold"]),
    "a list": ({**GOOD, "facts": ["one", "Three."]}, ["facts"]),
    "another format": ({**GOOD, "prompt": "else", "text": "more"}, ["prompt", "text"]),
    "a system text beside a system turn": (
        {"messages": [{"role": "system", "content": "Own."}, USER, ANSWER], "system": "Be brief."},
        ["system"],
    ),
    "tools beside a text": ({"prompt": "a", "completion": "b", "tools": "[1]", "system": "c"}, ["system", "tools"]),
    "the older of two": ({**GOOD, "tools": [{"name": "a"}], "functions": [{"name": "b"}]}, ["functions"]),
    "the other name of an answer": ({"instruction": "a", "output": "b", "response": "c"}, ["response"]),
    "a preference": ({"prompt": [USER], "completion": [ANSWER], "rejected": "Four."}, ["rejected"]),
    "a teacher of none": ({**GOOD, "teacher": "maths"}, ["teacher"]),
    "beside ids": ({"input_ids": [1, 2], "labels": [-100, 2], "note": "x"}, ["note"]),
    "a key of a turn": ({"messages": [USER, {**ANSWER, "mood": "gay"}]}, ["messages[].mood"]),
}
READ = {
    "made from": {"question": "How many?", "answer": "Three.", "prompt": [USER], "completion": [ANSWER], "n": 3},
    "nothing in it": {**GOOD, "note": " ", "more": [], "other": None, "empty": float("nan")},
    "our own": {"input_ids": [1, 2], "labels": [-100, 2], "prompt": "a", "truncated": False, "source_row": 3},
    "both names of one answer": {"instruction": "a", "output": "b", "response": "b"},
    "the same system text": {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "system": "s"},
    "ids of calls": {"messages": [USER, ANSWER, {"role": "tool", "content": "x", "tool_call_id": "1"}, ANSWER]},
}
READ["made from"] |= {"completion": [{**ANSWER, "content": "Three. 3"}]}


@pytest.mark.parametrize(("row", "names"), TOLD.values(), ids=TOLD.keys())
def test_what_nothing_reads_is_told(row, names, caplog):
    _, report = prepare([row])
    assert report.unread == {name: [0] for name in names}
    assert f"nothing reads {names[0]} (all rows)" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"


@pytest.mark.parametrize("row", READ.values(), ids=READ.keys())
def test_what_is_read_is_not_told(row):
    assert prepare([row])[1].unread == {}


def test_the_rows_are_named_where_it_is_not_all_of_them():
    rows = [{**GOOD, "note": note} for note in (None, "a", "b")]
    assert "note: nothing reads note (rows 1, 2)" in str(prepare(rows)[1])


def test_keys_that_the_template_writes_are_read():
    mood = {"messages": [USER, {**ANSWER, "mood": "gay"}]}
    for template in (
        CHATML.replace("message['role']", "message['role'] + (message.mood or '')"),
        "{{ message | tojson }}",
    ):
        chat = with_template(template if "content" in template else CHATML + "{# " + template + " #}")
        assert prepare([mood], chat)[1].unread == {}


@pytest.mark.parametrize("column", ["images", "image", "videos", "audio"])
def test_other_than_text_is_refused(column):
    for row in (GOOD, {"prompt": "a", "completion": "b"}):
        with pytest.raises(ValueError, match=f"train data set, row 0, column '{column}': holds .* only text"):
            one({**row, column: ["cat.png"]})
        assert one({**row, column: []}) == one(row)


# ------------------------------------------------------------------------------------------ rows without an answer

OPEN = {"messages": [USER, ANSWER, {**USER, "content": "Thanks."}]}


@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_chat_that_ends_with_a_question_is_cut_behind_its_last_answer(turns):
    rows, report = prepare([GOOD] * 9 + [OPEN], assistant_turns=turns)
    assert parts(rows[9]) == (PROMPT_TEXT, [ANSWER_TEXT])
    assert report.rows_with == {"question_left_out": [9]}
    assert "1 cut: what stands behind the last answer, a question without one: row 9" in str(report)
    called = {"role": "assistant", "content": "Let me look."}
    tool = {"messages": [USER, ANSWER, USER, called, {"role": "tool", "content": "4"}]}
    trained = parts(one(tool, assistant_turns=turns))[1]
    assert trained == ["Let me look.<|im_end|>"] if turns == "last" else [ANSWER_TEXT, "Let me look.<|im_end|>"]


def test_or_dropped_with_those_that_have_no_answer_at_all():
    rows, report = prepare([OPEN, GOOD, {"messages": [USER]}], unanswered_rows="drop")
    assert (rows["row"], report.rows_with) == ([1], {"unanswered": [0, 2]})
    with pytest.raises(ValueError, match="unanswered_rows='keep' is unknown"):
        prepare([GOOD], unanswered_rows="keep")


def test_where_no_answer_is_needed_the_question_is_the_prompt():
    rows, report = prepare([OPEN], prompt_only_ok=True)
    assert parts(rows[0])[0].endswith("Thanks.<|im_end|>\n<|im_start|>assistant\n")
    assert report.rows_with == {}


def test_answers_in_a_prompt_are_never_trained_on():
    history = {"prompt": [USER, ANSWER, {**USER, "content": "And now?"}]}
    with pytest.raises(ValueError, match="1 of the 1 rows of the train data set have a prompt but no answer"):
        one(history)


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ({"content": ""}, {}),
        ({"content": "y" * 300}, {"overlong_row": "drop"}),
        ({"weight": 0}, {}),
        ({}, {"max_length": 20}),
    ],
)
def test_a_row_is_a_prompt_where_only_its_answer_is_at_fault_and_none_is_needed(answer, options):
    row = {"messages": [USER, {**ANSWER, **answer}]}
    rows, report = prepare([row] * 3, **{"max_length": 200, **options}, prompt_only_ok=True)
    assert list(rows) == list(prepare([{"messages": [USER]}] * 3, prompt_only_ok=True)[0])
    assert (report.kept, report.prompt_only, report.rows_with) == (3, 3, {})
    if "max_length" not in options:
        assert prepare([row, GOOD], max_length=200, **options)[1].dropped == 1


def test_the_message_says_what_the_rows_need():
    ids = [{"input_ids": [1, 2]}]
    with pytest.raises(ValueError, match=r"`labels` with the id of each trained token.*beside `input_ids`"):
        prepare(ids)
    with pytest.raises(
        ValueError, match=r"of the eval data set have.*eval_loss is measured on .*whatever lmbda"
    ) as said:
        prepare([{"messages": [USER]}], name="eval", prompts_needed=False)
    assert "Set lmbda=1" not in str(said.value)


# ------------------------------------------------------------------------------------------------------ token rows


@pytest.mark.parametrize("mask", ["assistant_masks", "assistant_mask", "completion_mask", "loss_mask"])
def test_masks_of_other_trainers_say_what_is_trained(mask):
    row = {"input_ids": [11, 12, 13, 14], mask: [0, 0, 1, 1]}
    assert one(row)["labels"] == [-100, -100, 13, 14]
    assert one({**row, "labels": [11, 12, 13, 14]})["labels"] == [-100, -100, 13, 14]
    _, report = prepare([row, {**row, mask: [0, 0, 0, 0]}], prompt_only_ok=True)
    assert report.rows_with == {"masked": [1]}
    with pytest.raises(ValueError, match=f"column '{mask}': should hold 0 and 1 only, holds 2"):
        one({**row, mask: [0, 0, 1, 2]})


def test_two_masks_are_both_meant():
    row = {"input_ids": [1, 2, 3, 4], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 0, 1, 1]}
    assert one(row)["labels"] == [-100, -100, 3, 4]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"attention_mask": [1, 0, 1, 1]}, "column 'attention_mask': has zeros between ones"),
        ({"position_ids": [0, 1, 0, 1]}, "column 'position_ids': .*packed rows are not supported"),
        ({"seq_lengths": [2, 2]}, "column 'seq_lengths': .*packed rows are not supported"),
        ({"labels": [-100, True, 3, 4]}, "column 'labels': should be a list of integers"),
    ],
)
def test_rows_of_ids_that_cannot_be_honoured_are_refused(columns, problem):
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], **columns}
    with pytest.raises(ValueError, match=problem):
        one({"x": json.dumps(row)}, formatting_func=lambda raw: json.loads(raw["x"]))
    padded = {"attention_mask": [0, 1, 1, 1], "position_ids": [1, 0, 1, 2], "seq_lengths": [3]}
    assert one({**row, **columns, "labels": [-100, -100, 3, 4], **padded})["labels"] == [-100, 3, 4]
