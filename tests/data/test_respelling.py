"""A completion rewritten in another tokenizer's ids: by its text, special tokens apart."""

import random

import pytest
from spellings import END, random_text, tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gkd.data.alignment import Group
from gkd.data.respelling import Respelling
from gkd.data.token_bytes import spelled, token_bytes


def ids(kind, text):
    return tokenizer(kind)(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def ends(*kinds):
    return tuple(tokenizer(kind).convert_tokens_to_ids(END[kind]) for kind in kinds)


@pytest.mark.parametrize(("student", "teacher"), [("digits", "numbers"), ("pieces", "digits"), ("digits", "pieces")])
def test_it_is_what_the_other_tokenizer_makes_of_the_text_with_the_end_of_turn_in_its_place(student, teacher):
    end, draw = ends(student, teacher), random.Random(0)
    respelling = Respelling(tokenizer(student), tokenizer(teacher), end)
    for _ in range(30):
        text = random_text(draw)
        ours, theirs = [*ids(student, text), end[0]], [*ids(teacher, text), end[1]]
        assert respelling.for_teacher(ours) == theirs
        assert respelling.for_student(theirs) == ours
        last = respelling.groups(ours, theirs)[-1]
        assert last == Group(len(ours) - 1, len(ours) - 1, len(theirs) - 1, len(theirs) - 1)


def test_a_character_that_is_cut_at_the_end_is_not_read():
    respelling = Respelling(tokenizer("digits"), tokenizer("numbers"))
    cut = ids("digits", "one 日")[:-1]
    assert spelled(respelling.student.table, cut)[-1] not in (b" ", b"one")
    assert respelling.for_teacher(cut) == ids("numbers", "one ")
    assert not respelling.groups(cut, respelling.for_teacher(cut))[-1].compared


def test_a_special_token_without_a_partner_is_left_out_and_its_text_is_never_made_one():
    respelling = Respelling(tokenizer("digits"), tokenizer("pieces"))
    thought = tokenizer("digits").convert_tokens_to_ids("<think>")
    assert respelling.for_teacher([*ids("digits", "a"), thought]) == ids("pieces", "a")
    text = f"a {END['pieces']} b"
    theirs = respelling.for_teacher(ids("digits", text))
    assert tokenizer("pieces").eos_token_id not in theirs
    assert all(group.compared for group in respelling.groups(ids("digits", text), theirs))


def test_two_special_tokens_in_the_middle_stay_in_their_places():
    respelling = Respelling(tokenizer("digits"), tokenizer("numbers"), ends("digits", "numbers"))
    ours = [*ids("digits", "12"), *tokenizer("digits").convert_tokens_to_ids(["<think>", END["digits"]])]
    theirs = respelling.for_teacher([*ours, *ids("digits", "12")])
    special = tokenizer("numbers").convert_tokens_to_ids(["<think>", END["numbers"]])
    assert theirs == [*ids("numbers", "12"), *special, *ids("numbers", "12")]
    groups = respelling.groups([*ours, *ids("digits", "12")], theirs)
    assert groups == [Group(0, 1, 0, 0), Group(2, 2, 1, 1), Group(3, 3, 2, 2), Group(4, 5, 3, 3)]


def test_an_unknown_is_read_as_the_sign_for_one_and_not_compared():
    backend = Tokenizer(models.BPE({"[u]": 0, "a": 1, "b": 2, " ": 3}, [], unk_token="[u]"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("[u]", special=True)])
    few = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[u]")
    respelling = Respelling(few, tokenizer("digits"))
    ours = few("a日b")["input_ids"]
    assert token_bytes(few)[:2] == [None, b"a"]
    theirs = respelling.for_teacher(ours)
    assert theirs == ids("digits", "a\ufffdb")
    for other in (theirs, ids("digits", "a日b")):
        groups = respelling.groups(ours, other)
        assert [group.compared for group in groups] == [True, False, True]
