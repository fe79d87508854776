"""Tokens of one side only, counted with the common token that the other tokenizer begins to write their text with."""

import pytest
from other_tokens import other_tokenizer
from spellings import tokenizer
from tiny import tiny_tokenizer

from gkd.data.common_tokens import common_tokens
from gkd.data.joined_tokens import joined_tokens
from gkd.data.token_bytes import token_bytes

ALL = (10**6, 10**6)


def of(student, teacher, rows=ALL):
    common = common_tokens(student, teacher, *rows)
    return common, joined_tokens(student, teacher, common, *rows)


def test_it_is_the_first_token_of_the_text():
    student, teacher = tiny_tokenizer(), other_tokenizer()
    common, (ours, theirs) = of(student, teacher)
    assert ours is None, "each of its tokens is one byte, which the teacher has, too"
    names, ids = teacher.get_vocab(), student.get_vocab()
    found = {teacher.convert_ids_to_tokens(i): common.student[at].item() for i, at in theirs.T.tolist()}
    longer = [token for token in names if names[token] >= 258]
    assert found == {token: ids[token[0]] for token in longer}


@pytest.mark.parametrize(("student", "teacher"), [("digits", "numbers"), ("pieces", "digits"), ("digits", "pieces")])
def test_a_text_begins_with_what_it_is_counted_with_and_none_is_common(student, teacher):
    one, other = tokenizer(student), tokenizer(teacher)
    common, joined = of(one, other)
    for side, known, model in ((joined[0], common.student, one), (joined[1], common.teacher, other)):
        if side is None:
            continue
        table, ids = token_bytes(model), known.tolist()
        assert not set(side[0].tolist()) & set(ids)
        assert len(set(side[0].tolist())) == side.shape[1] > 0
        assert all(table[i].startswith(table[ids[at]]) for i, at in side.T.tolist())


def test_numbers_count_with_what_a_tokenizer_of_digits_writes_first():
    numbers, digits = tokenizer("numbers"), tokenizer("digits")
    common, (ours, _) = of(numbers, digits)
    found = dict(ours.T.tolist())
    texts = token_bytes(numbers)
    of_digits = {i: texts[i] for i in found if texts[i].isdigit()}
    assert len(of_digits) > 100
    for i, text in of_digits.items():
        assert texts[common.student[found[i]]] == text[:1]


def test_a_blank_in_front_of_a_whole_text_is_no_part_of_a_token():
    """SentencePiece writes "ing" at the beginning of a text as " ing"; within one it does not."""
    pieces, digits = tokenizer("pieces"), tokenizer("digits")
    _, (_, theirs) = of(pieces, digits)
    texts = token_bytes(digits)
    without = {i for i, _ in theirs.T.tolist() if texts[i][:1].isalpha()}
    assert len(without) > 50


def test_rows_behind_a_head_and_one_vocabulary():
    student, teacher = tiny_tokenizer(), other_tokenizer()
    _, (_, theirs) = of(student, teacher, (10**6, 260))
    assert theirs[0].tolist() == [258, 259]
    assert of(student, student)[1] == (None, None)
