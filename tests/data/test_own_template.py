"""The teacher reads chats in its own template: its prompts, and the tokens that end a turn."""

import copy

import pytest
from prepared import ANSWER, GOOD, TOKENIZER, USER, ids, one, prepare, with_template
from real_templates import NAMES, stop_ids_of, tokenizer_of
from tiny import CHATML, END_OF_TEXT, THINKING, TURN_END, tiny_rows, tiny_tokenizer

from gkd.data.end_map import check_end_map, find_end_map
from gkd.data.sequences import prompt_of
from gkd.data.teacher_rows import OwnTemplate, TeacherReading
from gkd.data.vocabulary import check_token_maps

PLAIN = (
    "{%- for message in messages -%}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{{ '<|endoftext|>' if message['role'] == 'assistant' }}{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}"
)
UNENDED = PLAIN.replace("<|endoftext|>", "")
TEXT, END = 256, 258  # ids of <|endoftext|> and <|im_end|>


def base_tokenizer(template=PLAIN):
    """As a base model's: it stops at <|endoftext|>."""
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def reading_of(student, teacher, stops=((), ()), said=None, view=None):
    own = OwnTemplate(teacher, tuple(stops[1]), find_end_map(student, teacher, *stops, said))
    return TeacherReading(view, (own,))


def as_read(row, reading):
    """All that the teacher reads of a row, and what it writes from."""
    row = {"teacher_context": [], "teacher_prompt_ids": [], **row}
    context = row["teacher_context"] or row["input_ids"][: row["prompt_length"]]
    completion = row["input_ids"][row["prompt_length"] :]
    if reading.end_map and completion[-1] == reading.end_map[0]:
        completion = [*completion[:-1], reading.end_map[1]]
    return [*context, *completion], row["teacher_prompt_ids"] or row["teacher_context"] or prompt_of(row)


@pytest.mark.parametrize("student", [PLAIN, CHATML, UNENDED, THINKING])
@pytest.mark.parametrize("teacher", [PLAIN, CHATML, THINKING])
def test_the_teacher_reads_what_it_would_by_itself(student, teacher):
    student = base_tokenizer(student) if student in (PLAIN, UNENDED) else with_template(student)
    teacher = base_tokenizer(teacher) if teacher == PLAIN else with_template(teacher)
    reading, raw = reading_of(student, teacher), tiny_rows(12)
    rows, report = prepare(raw, student, reading=reading)
    plain, _ = prepare(raw, student)
    native, _ = prepare(raw, teacher)
    for row, before, own in zip(rows, plain, native, strict=True):
        assert {name: row[name] for name in before} == before
        assert as_read(row, reading) == (own["input_ids"], prompt_of(own))
    alike = student.chat_template.replace("<|endoftext|>", "") == teacher.chat_template.replace("<|endoftext|>", "")
    assert report.views == (0 if alike else 12)


@pytest.mark.parametrize("name", NAMES)
def test_templates_of_real_models(name):
    """Between the answer and the token that ends it, and in front of both, nothing of the student's is left."""
    teacher = tokenizer_of(name)
    student = copy.deepcopy(teacher)
    student.chat_template, student.eos_token = CHATML, TURN_END
    reading = reading_of(student, teacher, ((), stop_ids_of(name)))
    row, own = one(GOOD, student, reading=reading), one(GOOD, teacher, stop_ids=stop_ids_of(name))
    ids_read, prompt = as_read(row, reading)
    text = teacher.decode(own["input_ids"])
    assert prompt == prompt_of(own)
    # Cohere's last models end a turn with two tokens; of such an end, the one that the model stops at is read.
    assert teacher.decode(ids_read) == text.replace("<|END_RESPONSE|><|END_OF_TURN", "<|END_OF_TURN")


def test_options_and_columns_hold_for_the_own_template():
    template = CHATML.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n' + (style or '')")
    teacher = with_template(template)
    reading = reading_of(TOKENIZER, teacher)
    row = {**GOOD, "chat_template_kwargs": {"style": "<s>"}, "teacher_system": "S"}
    want = one(
        {"messages": [{"role": "system", "content": "S"}, USER, ANSWER], "chat_template_kwargs": {"style": "<s>"}},
        teacher,
    )
    assert as_read(one(row, reading=reading), reading)[1] == prompt_of(want)
    viewed = reading_of(TOKENIZER, teacher, view=lambda row: {"prompt": "Q?"})
    assert as_read(one(GOOD, reading=viewed), viewed)[1] == ids("Q?"), "a text is a text, whatever the template"


def test_instructions_are_chats_for_a_teacher_with_a_template():
    student = tiny_tokenizer(chat_template=None)
    student.eos_token = END_OF_TEXT
    reading = reading_of(student, TOKENIZER)
    assert reading.end_map == (TEXT, END)
    row = {"instruction": "Add.", "input": "1 + 2", "output": "3"}
    assert as_read(one(row, student, reading=reading), reading)[0] == one(row, TOKENIZER)["input_ids"]


@pytest.mark.parametrize(
    ("row", "kind"),
    [({"prompt": "a", "completion": "b"}, "plain text"), ({"input_ids": [1, 2], "labels": [-100, 2]}, "token ids")],
)
def test_rows_without_turns_are_refused_unless_they_say_what_the_teacher_reads(row, kind):
    reading = reading_of(TOKENIZER, with_template(PLAIN))
    with pytest.raises(ValueError, match=rf"row 0 is {kind}, which has no turns .* column teacher_prompt"):
        one(row, reading=reading)
    read = as_read(one({**row, "teacher_prompt": [USER]}, reading=reading), reading)
    assert read[1] == ids("User: How many?\nAssistant: ")


def test_rows_of_ids_may_bring_their_view_and_prepared_ones_have_it():
    reading = reading_of(TOKENIZER, with_template(PLAIN))
    row = one({"input_ids": [1, 2], "labels": [-100, 2], "teacher_context": [9]}, reading=reading)
    assert row["teacher_context"] == [9]
    same = reading_of(TOKENIZER, with_template(CHATML))
    ready, _ = prepare([GOOD], reading=same)
    again, _ = prepare(ready, reading=same)
    assert again.to_list() == ready.to_list()


# -------------------------------------------------------------------------------------------------- ends of turns


def test_a_pair_is_read_off_both_templates():
    assert find_end_map(base_tokenizer(), TOKENIZER) == (TEXT, END)
    assert find_end_map(TOKENIZER, base_tokenizer()) == (END, TEXT)
    assert find_end_map(TOKENIZER, with_template(THINKING)) is None
    assert find_end_map(base_tokenizer(None), TOKENIZER) == (TEXT, END), "one stop token is no guess"
    assert find_end_map(base_tokenizer(UNENDED), TOKENIZER, [TEXT], [TEXT, END]) == (TEXT, END)


@pytest.mark.parametrize("template", [None, UNENDED])
def test_a_guess_is_refused_and_may_be_said_by_hand(template):
    student = base_tokenizer(template)
    with pytest.raises(
        ValueError, match=r"student's tokenizer has .* \(256 \(<\|endoftext\|>\), 258 .*teacher_end_of_turn="
    ):
        find_end_map(student, TOKENIZER, [TEXT, END])
    with pytest.raises(ValueError, match=r"teacher's tokenizer has .* would be a guess"):
        find_end_map(TOKENIZER, student, [], [END])
    assert find_end_map(student, TOKENIZER, [TEXT, END], said="<|endoftext|>=<|im_end|>") == (TEXT, END)
    assert find_end_map(student, TOKENIZER, [TEXT, END], said=" <|im_end|> = <|im_end|> ") is None


@pytest.mark.parametrize(
    "said", ["", "=", "<|endoftext|>", "<|endoftext|>=", "a=<nothing>", "<|endoftext|>:<|im_end|>"]
)
def test_what_is_said_must_name_two_tokens(said):
    with pytest.raises(ValueError, match=r"teacher_end_of_turn='.*' does not name two tokens"):
        find_end_map(base_tokenizer(), TOKENIZER, said=said)


def test_a_token_that_ends_no_turn_has_no_effect():
    with pytest.raises(
        ValueError, match=r"teacher_end_of_turn='a=<\|im_end\|>' has no effect: .*it stops at <\|endoft"
    ):
        find_end_map(base_tokenizer(), TOKENIZER, said="a=<|im_end|>")


def test_a_token_without_a_row_in_both_heads_is_refused():
    check_end_map((256, 258), 259)
    check_end_map(None, 1)
    with pytest.raises(ValueError, match="only 258 ids are compared"):
        check_end_map((256, 258), 258)


def test_token_maps_are_compared_before_anything_is_rendered():
    check_token_maps(TOKENIZER, base_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    check_token_maps(TOKENIZER, other)
    moved = tiny_tokenizer()
    moved.add_tokens(["<a>", "<b>"])
    swapped = tiny_tokenizer()
    swapped.add_tokens(["<b>", "<a>"])
    with pytest.raises(ValueError, match="have different tokenizers"):
        check_token_maps(moved, swapped)
