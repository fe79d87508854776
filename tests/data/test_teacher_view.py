"""Sequences and batches that the teacher reads otherwise than the student: positions by hand, and the way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd.data.sequences import PaddingCollator, TokenSequence, collate, cut, join, sequence_of, unpad
from gkd.data.targets import IGNORE, targets_of
from gkd.data.teacher_view import teacher_view

ROW = {"input_ids": [1, 2, 3, 4, 9], "labels": [IGNORE, IGNORE, 3, 4, 9], "prompt_length": 2, "row": 5}
IDS = st.lists(st.integers(1, 50), min_size=1, max_size=6)
ENDS = (9, 60)


@st.composite
def sequences(draw):
    """Rows with and without a view, answers that end with the student's token or not, targets here and there."""
    prompt, answer = draw(IDS), draw(IDS)
    context = draw(st.one_of(st.just([]), IDS))
    sequence = join(prompt, answer, "data", draw(st.integers(0, 9)), teacher_prompt=context, end_map=ENDS)
    kept = draw(st.lists(st.booleans(), min_size=len(answer), max_size=len(answer)))
    sequence.labels = [IGNORE] * len(prompt) + [i if keep else IGNORE for i, keep in zip(answer, kept, strict=True)]
    return sequence


@given(st.lists(sequences(), min_size=1, max_size=6), st.sampled_from([None, 4]))
@settings(deadline=None, max_examples=60)
def test_target_n_is_the_same_token_of_the_same_completion_in_both(rows, multiple):
    batch = collate(rows, 0, multiple)
    view = teacher_view(batch)
    assert (view is batch) == (not any(row.teacher_context or row.teacher_last for row in rows))
    own, read = targets_of(batch), targets_of(view)
    assert torch.equal(own.rows, read.rows)
    assert torch.equal(own.places, read.places)
    width, read_width = batch["input_ids"].shape[1], view["input_ids"].shape[1]
    for n, row in enumerate(own.rows.tolist()):
        sequence = rows[row]
        place = int(own.at[n]) - row * width + 1 - sequence.prompt_length  # of the completion
        context = sequence.teacher_context or sequence.input_ids[: sequence.prompt_length]
        assert int(read.at[n]) - row * read_width + 1 - len(context) == place
        length = int(view["attention_mask"][row].sum())
        ids = view["input_ids"][row, :length].tolist()
        answer = sequence.input_ids[sequence.prompt_length :]
        assert ids == [*context, *answer[:-1], 60 if answer[-1] == 9 else answer[-1]]
        assert int(read.ids[n]) == ids[len(context) + place]
        assert int(own.ids[n]) == answer[place]


@given(st.lists(sequences(), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_a_padded_batch_taken_apart_is_what_it_was(rows):
    features = [
        {
            "input_ids": row.input_ids, "labels": row.labels, "prompt_length": row.prompt_length, "row": row.row,
            "teacher_context": row.teacher_context, "teacher_prompt_ids": [7, 7] if row.row % 2 else [],
        }
        for row in rows
    ]  # fmt: skip
    collator = PaddingCollator(0, end_map=ENDS)
    sequences = collator.sequences(features)
    again = unpad(collator(features))
    seen = any(sequence.has_view for sequence in sequences)
    for before, after in zip(sequences, again, strict=True):
        assert after.teacher_row() == before.teacher_row()
        assert after.teacher_context == before.teacher_context
        assert not seen or after.teacher_prompt == before.teacher_prompt


def test_what_the_teacher_writes_from():
    own = [1, 2]
    assert sequence_of(ROW).teacher_prompt == own
    assert sequence_of({**ROW, "prompt_ids": [8]}).teacher_prompt == [8]
    assert sequence_of({**ROW, "teacher_context": [7, 7]}).teacher_prompt == [7, 7]
    assert sequence_of({**ROW, "teacher_context": [7, 7], "teacher_prompt_ids": own}).teacher_prompt == own
    assert sequence_of({**ROW, "teacher_prompt_ids": [6]}).teacher_prompt == [6]
    same = sequence_of({**ROW, "teacher_context": own, "prompt_ids": [8]})
    assert (same.has_view, same.teacher_prompt) == (False, own)


def test_a_rollout_is_read_behind_the_teachers_prompt():
    row = sequence_of({**ROW, "teacher_context": [7, 7], "teacher_prompt_ids": [6]})
    assert row.teacher_row() == ([7, 7, 3, 4, 9], [IGNORE, IGNORE, 3, 4, 9])
    rollout = join(row.prompt, [5, 5], "student", 5, teacher_prompt=row.teacher_prompt)
    assert rollout.teacher_row() == ([6, 5, 5], [IGNORE, 5, 5])
    left_out = join(row.prompt, [5, 5], "student", 5, train=False, teacher_prompt=row.teacher_prompt)
    assert left_out.teacher_row() == ([6, 5, 5], [IGNORE] * 3)


def test_what_the_teacher_wrote_ends_with_its_token_and_is_trained_with_the_students():
    written = join([1], [4, 60], "teacher", 0, teacher_prompt=[2, 2], end_map=ENDS)
    assert (written.input_ids, written.labels) == ([1, 4, 9], [IGNORE, 4, 9])
    assert written.teacher_row() == ([2, 2, 4, 60], [IGNORE, IGNORE, 4, 60])
    cut_off = join([1], [4, 5], "teacher", 0, end_map=ENDS)
    assert cut_off.teacher_row() == (cut_off.input_ids, cut_off.labels)
    by_student = join([1], [4, 60], "student", 0, end_map=ENDS)  # the student's own text stays
    assert by_student.input_ids == [1, 4, 60]


def test_nothing_predicts_the_first_token_of_a_text_for_the_teacher_either():
    text = TokenSequence([3, 4, 5], [3, 4, 5], 0, teacher_context=[7, 7])
    batch = collate([text], 0)
    assert batch["target_ids"].tolist() == teacher_view(batch)["target_ids"].tolist() == [4, 5]


def test_the_longest_of_both_comes_first():
    rows = [TokenSequence([1] * 4, [IGNORE] * 3 + [1], 3, row=0), TokenSequence([1] * 9, [IGNORE] * 9, 2, row=1)]
    rows.append(TokenSequence([1] * 3, [IGNORE] * 2 + [1], 2, row=2, teacher_context=[1] * 20))
    assert [[row.row for row in batch] for batch in cut(rows, [1, 1, 1])] == [[2], [1], [0]]


def test_earlier_answers_have_no_place_in_a_view():
    row = {**ROW, "labels": [IGNORE, 2, 3, 4, 9], "teacher_context": [7]}
    with pytest.raises(ValueError, match=r"row 5 has targets before its last answer \(assistant_turns='all'\)"):
        sequence_of(row)
    assert sequence_of({**row, "teacher_context": [1, 2]}).num_targets == 4
