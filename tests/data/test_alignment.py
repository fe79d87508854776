"""Groups of two tokenizers' ids: the same bytes on both sides, all of them, in order, and as short as can be."""

import os
import random

import pytest
import regex
from spellings import is_there, random_text, tokenizer

from gkd.data.alignment import Group, align, special_bytes
from gkd.data.respelling import Respelling
from gkd.data.token_bytes import spelled

TEXTS = int(os.environ.get("GKD_TEST_TEXTS", "60"))  # 10,000 take three minutes
MOST = 16  # tokens in a group of more than one character


def pieces(text):
    """Tokens between bars; # is a token without text."""
    return [None if piece == "#" else piece.encode() for piece in text.split("|")]


CASES = {
    "the same tokens": ("The| cat", "The| cat", [(0, 0, 0, 0), (1, 1, 1, 1)]),
    "one to two": (" cat|!", " c|at|!", [(0, 0, 0, 1), (1, 1, 2, 2)]),
    "two to one": ("1|2|.", "12|.", [(0, 1, 0, 0), (2, 2, 1, 1)]),
    "two to two": ("12|3|.", "1|23|.", [(0, 1, 0, 1), (2, 2, 2, 2)]),
    "a beginning of text, on the teacher's side": ("a|b", "#|a|b", [(0, 0, 1, 1), (1, 1, 2, 2)]),
    "a beginning of text, on the student's side": ("#|a|b", "a|b", [(0, 0, 0, -1), (1, 1, 0, 0), (2, 2, 1, 1)]),
    "a blank of the teacher's in front": ("a|b", " a|b", [(0, 0, 0, 0), (1, 1, 1, 1)]),
    "a blank of the student's in front": ("#| |a|b", "a|b", [(0, 0, 0, -1), (1, 2, 0, 0), (3, 3, 1, 1)]),
    "one blank more": ("  |a", " |a", [(0, 0, 0, 0), (1, 1, 1, 1)]),
    "a letter that the teacher has no word for": ("a|é|b", "a|#|b", [(0, 0, 0, 0), (1, 1, 1, 0), (2, 2, 2, 2)]),
    "such a letter inside a token": ("aé|b", "a|#|b", [(0, 0, 0, -1), (1, 1, 2, 2)]),
    "letters that the student has no word for": ("a|#|#|b|c", "a漢|字b|c", [(0, 3, 0, -1), (4, 4, 2, 2)]),
    "an accent that the teacher joins": ("x|e|\u0301|y", "x|é|y", [(0, 0, 0, 0), (1, 2, 1, 0), (3, 3, 2, 2)]),
    "two of them": ("e\u0301|o|\u0301|.", "é|ó|.", [(0, 0, 0, -1), (1, 2, 1, 0), (3, 3, 2, 2)]),
    "a teacher that reads less": ("ab|cd|ef", "ab|c", [(0, 0, 0, 0), (1, 2, 1, 0)]),
    "a teacher that reads on": ("ab", "ab|cd", [(0, 0, 0, 0)]),
    "nothing on the teacher's side": ("ab|c", "#", [(0, 1, 0, -1)]),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_of_known_tokens(case):
    student, teacher, groups = CASES[case]
    assert align(pieces(student), pieces(teacher)) == [Group(*group) for group in groups]


def test_an_end_in_the_middle_of_a_character_is_not_compared():
    whole, cut = "日".encode(), "本".encode()[:2]
    groups = align([b"a", whole[:1], whole[1:], cut[:1], cut[1:]], [b"a", whole])
    assert groups == [Group(0, 0, 0, 0), Group(1, 2, 1, 1), Group(3, 4, 2, 1)]
    assert [group.compared for group in groups] == [True, True, False]


def test_bytes_of_no_character_are_not_compared_with_the_sign_for_them():
    groups = align([b"a", b"\x80", b"\x81", b"b"], [b"a", "\ufffd".encode(), b"b"])
    assert groups == [Group(0, 0, 0, 0), Group(1, 2, 1, 0), Group(3, 3, 2, 2)]


def test_special_tokens_that_stand_for_each_other_are_one_group_each():
    end = special_bytes(7, 70)
    assert align([b"ab", b"c", end], [b"abc", end]) == [Group(0, 1, 0, 0), Group(2, 2, 1, 1)]
    # Behind text that differs, too.
    assert align([b"x", None, end], [b"x", b"yy", end])[-1] == Group(2, 2, 2, 2)
    assert align([b"x", None, None], [b"x", None, None])[1:] == [Group(1, 2, 1, 0)]


def test_no_tokens_no_groups():
    assert align([], []) == align([], [b"a"]) == []
    assert align([b"a"], []) == [Group(0, 0, 0, -1)]


def check_groups(respelling, student_ids, teacher_ids):
    """The groups' own rules, from the bytes; returns the student tokens that are not compared."""
    groups = respelling.groups(student_ids, teacher_ids)
    ours, theirs = spelled(respelling.student.table, student_ids), spelled(respelling.teacher.table, teacher_ids)
    assert [i for g in groups for i in range(g.student_first, g.student_last + 1)] == list(range(len(student_ids)))
    read = [i for g in groups for i in range(g.teacher_first, g.teacher_last + 1)]
    assert read == sorted(set(read))
    for g in groups:
        text = b"".join(piece or b"" for piece in ours[g.student_first : g.student_last + 1])
        if g.compared:
            other = b"".join(theirs[g.teacher_first : g.teacher_last + 1])
            first = 0 in (g.student_first, g.teacher_first)
            assert text == other or (first and (text == b" " + other or other == b" " + text))
            # As short as can be: no two beginnings of its sides are alike.
            if not first:
                ends = [
                    {sum(map(len, side[a : k + 1])) for k in range(a, b)}
                    for side, a, b in (
                        (ours, g.student_first, g.student_last),
                        (theirs, g.teacher_first, g.teacher_last),
                    )
                ]
                assert not ends[0] & ends[1]
        if max(g.num_student, g.num_teacher) > MOST:
            # Indentation, or a line of dots, may be one token on one side and sign by sign on the other.
            signs = regex.sub(r"(.)\1+", r"\1", "".join(text.decode("utf-8", "replace").split()))
            characters = regex.findall(r"\X", signs)
            # What is not compared may hold a token that begins in one such character and ends in the next.
            assert len(characters) <= (1 if g.compared else 3), text
    return groups, len(read)


def compare(student, teacher, count, seed=0):
    respelling = Respelling(tokenizer(student), tokenizer(teacher))
    draw = random.Random(seed)
    for number in range(count):
        text = random_text(draw)
        ours, direct = (tokenizer(kind)(text, add_special_tokens=False)["input_ids"] for kind in (student, teacher))
        theirs = respelling.for_teacher(ours) if number % 2 else direct
        groups, read = check_groups(respelling, ours, theirs)
        if "composed" not in (student, teacher):  # both write every text byte by byte
            assert all(group.compared for group in groups), text
            assert read == len(theirs), text
        elif teacher == "composed":  # it says what of a text is not as it reads it
            assert all(group.compared for group in groups) or respelling.for_student(theirs) != ours, text


PAIRS = [("pieces", "digits"), ("digits", "numbers"), ("numbers", "pieces"), ("digits", "composed")]
PAIRS += [("composed", "pieces"), ("smollm2", "numbers"), ("smollm2", "pieces")]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_random_texts_are_covered_once_in_order_and_in_short_groups(student, teacher):
    if not is_there(student):
        pytest.skip("SmolLM2's tokenizer is not there (make fetch)")
    compare(student, teacher, TEXTS)


@pytest.mark.parametrize("kind", ["pieces", "digits", "composed"])
def test_one_tokenizer_is_one_to_one(kind):
    respelling, draw = Respelling(tokenizer(kind), tokenizer(kind)), random.Random(3)
    for _ in range(30):
        ids = tokenizer(kind)(random_text(draw))["input_ids"]
        cut = ids[: draw.randint(0, len(ids))]
        assert respelling.groups(cut, cut) == [Group(i, i, i, i) for i in range(len(cut))]


def test_unknown_letters_do_not_put_the_rest_out_of_step():
    """The real tokenizer of a few books knows no digits' signs, no capitals with accents, no emoji."""
    if not (is_there("glass") and is_there("smollm2")):
        pytest.skip("the demo's tokenizers are not there (make fetch)")
    text = "“Oh dear!” said Élise 😀, and 日本語 was not a word that she knew & liked.\nAlice [was] beginning."
    respelling = Respelling(tokenizer("glass"), tokenizer("smollm2"))
    coded = [tokenizer(kind)(text, return_offsets_mapping=True) for kind in ("glass", "smollm2")]
    ours, theirs = (code["input_ids"] for code in coded)
    for other in (theirs, respelling.for_teacher(ours)):
        groups, _ = check_groups(respelling, ours, other)
        unknown = {i for i, piece in enumerate(spelled(respelling.student.table, ours)) if piece is None}
        left_out = {i for g in groups if not g.compared for i in range(g.student_first, g.student_last + 1)}
        assert unknown <= left_out
        assert len(left_out) <= len(unknown) + 6
    # The tokenizers' own offsets in the text say the same.
    places = [code["offset_mapping"] for code in coded]
    for g in respelling.groups(ours, theirs):
        if g.compared:
            assert places[0][g.student_last][1] == places[1][g.teacher_last][1]
