"""What a row's teacher reads: columns, a function and their ids, compared with the same row given to it alone."""

import pytest
from datasets import Dataset
from prepared import ANSWER, GOOD, TOKENIZER, USER, ids, one, prepare, with_template
from tiny import CHATML, THINKING, tiny_rows

from gkd.data.sequences import prompt_of
from gkd.data.teacher_rows import TeacherReading

SYSTEM = {"role": "system", "content": "Answer briefly."}
HINT = {"role": "user", "content": "How many? It is three."}
EXAMPLE = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "One."}, USER]
SOLVED = [SYSTEM, HINT]


def alone(row, tokenizer=TOKENIZER, **options):
    """A row that a teacher would read for itself: what stands in front of its answer, and its prompt."""
    row = one(row, tokenizer, **options)
    return row["input_ids"][: row["prompt_length"]], prompt_of(row)


def fronts(row):
    """What the teacher reads in front of the answer, and what it writes from."""
    context = row["teacher_context"] or row["input_ids"][: row["prompt_length"]]
    return context, row["teacher_prompt_ids"] or row["teacher_context"] or prompt_of(row)


def padded(rows):
    """A data set takes its columns from the first row."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_list([{key: row.get(key) for key in keys} for row in rows])


CASES = {
    "turns": ({"teacher_prompt": SOLVED}, [*SOLVED, ANSWER]),
    "turns as JSON": ({"teacher_prompt": '[{"role": "user", "content": "Q"}]'}, [{**USER, "content": "Q"}, ANSWER]),
    "an example": ({"teacher_prompt": EXAMPLE}, [*EXAMPLE, ANSWER]),
    "a text": ({"teacher_prompt": "Q?"}, [{**USER, "content": "Q?"}, ANSWER]),
    "a system turn": ({"teacher_system": "Answer briefly."}, [SYSTEM, USER, ANSWER]),
    "both": (
        {"teacher_prompt": "Q?", "teacher_system": "S"},
        [{**SYSTEM, "content": "S"}, {**USER, "content": "Q?"}, ANSWER],
    ),
    "another system turn": (
        {"messages": [SYSTEM, USER, ANSWER], "teacher_system": "S"},
        [{**SYSTEM, "content": "S"}, USER, ANSWER],
    ),
}


@pytest.mark.parametrize("template", [CHATML, THINKING], ids=["chatml", "thinking"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_give_what_the_row_of_their_chat_would(case, template):
    """With THINKING the prompt is no prefix of the answered chat, so context and prompt differ."""
    columns, chat = CASES[case]
    tokenizer = with_template(template)
    row, plain = (
        one({**GOOD, **columns}, tokenizer),
        one({"messages": columns.get("messages", GOOD["messages"])}, tokenizer),
    )
    assert {name: row[name] for name in plain} == plain, "the student's side does not change"
    assert fronts(row) == alone({"messages": chat}, tokenizer)


def test_a_text_row_has_a_text_for_its_teacher():
    row = one({"prompt": "2 + 1 = ", "completion": "3", "teacher_prompt": "Three ones: "})
    assert fronts(row) == (ids("Three ones: "), ids("Three ones: "))
    assert row["input_ids"] == [*ids("2 + 1 = "), *ids("3<|im_end|>")]


def test_turns_are_for_a_text_row_too():
    row = one({"prompt": "2 + 1 = ", "completion": "3", "teacher_prompt": SOLVED})
    assert fronts(row)[1] == alone({"prompt": SOLVED}, prompt_only_ok=True)[1]


def test_running_text_has_a_beginning_for_its_teacher_alone():
    row = one({"text": "abc", "teacher_prompt": "Letters: "}, prompts_needed=False)
    assert row["teacher_context"] == ids("Letters: ")
    assert row["labels"][0] == -100, "the first id has nothing in front of it for the student"


def test_only_rows_that_differ_have_a_view_and_the_report_counts_them():
    rows, report = prepare(padded([GOOD, {**GOOD, "teacher_system": "S"}, {**GOOD, "teacher_prompt": [USER]}]))
    assert [bool(row["teacher_context"]) for row in rows] == [False, True, False]
    assert report.views == 1
    assert "in 1 of them the teacher reads a prompt of its own" in str(report)
    assert report.remarks() == []


@pytest.mark.parametrize("extra", [{}, {"teacher_prompt": [USER]}, {"teacher_system": ""}, {"teacher_prompt": None}])
def test_a_teacher_that_reads_the_students_prompt_leaves_the_rows_as_they_were(extra):
    rows, _ = prepare([{**row, **extra} for row in [GOOD] * 3])
    plain, _ = prepare([GOOD] * 3)
    assert rows.column_names == plain.column_names
    assert rows.to_list() == plain.to_list()


def test_a_function_sees_the_row_as_it_is_stored():
    def view(row):
        row["messages"].insert(0, {"role": "system", "content": row["solution"]})  # of its own copy
        return row

    row = {**GOOD, "solution": "It is three.", "teacher_system": "not read"}
    formatted = lambda row: {"messages": row["messages"]}  # noqa: E731
    for options in ({}, {"formatting_func": formatted}):
        found = one(row, reading=TeacherReading(view), **options)
        assert found["input_ids"] == one(GOOD)["input_ids"]
        assert fronts(found) == alone({"messages": [{**SYSTEM, "content": "It is three."}, *GOOD["messages"]]})
    _, report = prepare([row], reading=TeacherReading(view))
    assert list(report.unread) == ["teacher_system"], "what the function put into its prompt is read"


def test_a_function_may_return_the_prompt_alone_or_ids():
    chat = [SYSTEM, USER]
    want = alone({"messages": [*chat, ANSWER]}, with_template(THINKING))
    found = one(GOOD, with_template(THINKING), reading=TeacherReading(lambda row: {"prompt": chat}))
    assert fronts(found) == want
    found = one(GOOD, reading=TeacherReading(lambda row: {"input_ids": [5, 6, 7]}))
    assert fronts(found) == ([5, 6, 7], [5, 6, 7])


def test_prompts_alone_have_a_view():
    rows, _ = prepare([{"prompt": [USER], "teacher_system": "S"}], prompt_only_ok=True)
    assert fronts(rows[0])[1] == alone({"prompt": [{**SYSTEM, "content": "S"}, USER]}, prompt_only_ok=True)[1]


def test_an_answer_that_is_left_out_leaves_the_view():
    row = {**GOOD, "teacher_system": "S"}
    want = alone({"prompt": [{**SYSTEM, "content": "S"}, USER]}, prompt_only_ok=True)[1]
    found = one(row, max_length=len(one(GOOD)["input_ids"]) - 1, overlong_row="drop", prompt_only_ok=True)
    assert set(found["labels"]) == {-100}
    assert fronts(found)[1] == want


def test_limits_are_the_students():
    rows = [
        {**GOOD, "teacher_system": "S" * 200},
        {"messages": [{**USER, "content": "x" * 90}, ANSWER], "teacher_system": "S"},
    ]
    whole = one(rows[1])
    prepared, _ = prepare(padded(rows), max_length=100, max_prompt_length=80, overlong_prompt="keep_end")
    assert len(prepared[0]["teacher_context"]) > 200
    assert prepared[1]["prompt_length"] == 80
    assert prepared[1]["teacher_context"] == whole["teacher_context"]


def test_prepared_rows_keep_their_view():
    rows, _ = prepare(padded([GOOD, {**GOOD, "teacher_system": "S"}]), with_template(THINKING))
    again, _ = prepare(rows, with_template(THINKING))
    assert again.to_list() == rows.to_list()
    ready, _ = prepare(rows, reading=TeacherReading(lambda row: row["nothing"]))  # which has been at work already
    assert ready["teacher_context"] == rows["teacher_context"]


def test_rows_of_ids_bring_a_view():
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    assert fronts(one({**row, "teacher_context": [9, 9]})) == ([9, 9], [9, 9])
    assert fronts(one({**row, "teacher_prompt_ids": [9]})) == ([1, 2], [9])
    assert fronts(one({**row, "teacher_context": [8], "teacher_prompt_ids": [9]})) == ([8], [9])
    assert fronts(one({**row, "teacher_prompt": "ab"}))[0] == ids("ab")


def view_of(made):
    return {"reading": TeacherReading(lambda row: row if row.get("text") else made)}


TEXTS = {"prompt": "a", "completion": "b"}
BAD = [
    (
        {**GOOD, "teacher_prompt": 5},
        {},
        "row 1, column 'teacher_prompt': should be a text or a list of turns, got int 5",
    ),
    ({**GOOD, "teacher_prompt": [USER, ANSWER]}, {}, "row 1, column 'teacher_prompt': ends with an assistant turn"),
    ({**GOOD, "teacher_prompt": [{"role": "x"}]}, {}, "row 1, column 'teacher_prompt': turn 0 has the unknown role"),
    ({**GOOD, "teacher_system": 5}, {}, "row 1, column 'teacher_system': should be text, got int 5"),
    ({**TEXTS, "teacher_system": "S"}, {}, "row 1, column 'teacher_system': is for chats, and this row is plain text"),
    ({"input_ids": [1], "labels": [1], "teacher_system": "S"}, {"prompts_needed": False}, "this row is token ids"),
    ({"input_ids": [1, 2], "labels": [-100, 2], "teacher_context": [999]}, {}, "'teacher_context': holds the id 999"),
    ({"input_ids": [1, 2], "labels": [-100, 2], "teacher_context": "x"}, {}, "'teacher_context': should be a list of"),
    (GOOD, view_of(None), "teacher_view returned NoneType None for row 1 of the train data set"),
    (GOOD, view_of({"x": 1}), "row 1, as teacher_view returned it: no format known for the columns ['x']"),
    (
        GOOD,
        view_of({"prompt": [USER], "completion": "Four."}),
        "row 1, as teacher_view returned it, has another answer",
    ),
    (GOOD, view_of({"prompt": [USER], "image": "x.png"}), "as teacher_view returned it, column 'image'"),
    (
        {"messages": [*EXAMPLE, ANSWER], "teacher_system": "S"},
        {"assistant_turns": "all"},
        "row 1 trains on answers before its last one, which have no place in a prompt of the teacher's own: set",
    ),
]


@pytest.mark.parametrize(("row", "options", "message"), BAD)
def test_what_cannot_be_read_is_refused_by_row_and_column(row, options, message):
    first = {"input_ids": [1, 2], "labels": [-100, 2]} if "input_ids" in row else {"text": "abc"}
    data, options = padded([first, row]), {"prompts_needed": False, **options}
    with pytest.raises(ValueError) as error:
        prepare(data, **options)
    assert message in str(error.value)


def test_a_template_that_stumbles_says_in_whose_reading():
    strict = with_template(
        CHATML.replace(
            "{%- for",
            "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}{%- for",
            1,
        )
    )
    with pytest.raises(
        ValueError, match=r"row 0, as its teacher reads it: the chat template cannot render .*no system"
    ):
        one({**GOOD, "teacher_system": "S"}, strict)


def test_many_rows_of_all_kinds():
    rows, report = prepare([{**row, "teacher_system": "S"} for row in tiny_rows(40)])
    assert report.views == 40 == len(rows)
    for row, raw in zip(rows, tiny_rows(40), strict=True):
        chat = [turn for turn in raw["messages"] if turn["role"] != "system"]
        assert fronts(row) == alone({"messages": [{"role": "system", "content": "S"}, *chat]})
