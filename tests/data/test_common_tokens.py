"""Ids that two vocabularies spell alike: the same bytes, each once, and special tokens by what they are for."""

import torch
from spellings import END, tokenizer
from tiny import tiny_tokenizer
from tokenizers import AddedToken

from gkd.data.common_tokens import common_tokens, special_pairs
from gkd.data.end_map import end_pair, find_end_map
from gkd.data.token_bytes import token_bytes


def of(student, teacher, end=None, rows=(10**6, 10**6)):
    found = common_tokens(student, teacher, *rows, end)
    assert found.student.shape == found.teacher.shape
    assert found.student.dtype == found.teacher.dtype == torch.long
    assert found.student.tolist() == sorted(set(found.student.tolist()))
    assert len(set(found.teacher.tolist())) == len(found.teacher)
    return dict(zip(found.student.tolist(), found.teacher.tolist(), strict=True))


def test_they_are_those_of_the_same_bytes_and_all_of_those():
    student, teacher = tokenizer("pieces"), tokenizer("digits")
    pairs, ours, theirs = of(student, teacher), token_bytes(student), token_bytes(teacher)
    assert all(ours[s] == theirs[t] is not None for s, t in pairs.items())
    assert {ours[s] for s in pairs} == {*ours} & {*theirs} - {None}
    assert pairs[student.get_vocab()["▁the"]] == teacher.get_vocab()["Ġthe"]
    assert pairs[student.get_vocab()["<0xE6>"]] == teacher.get_vocab()["æ"]


def test_the_other_way_round_is_the_same():
    there = of(tokenizer("pieces"), tokenizer("digits"))
    assert {t: s for s, t in of(tokenizer("digits"), tokenizer("pieces")).items()} == there


def test_a_piece_goes_before_the_byte_that_only_stands_in_for_what_is_lacking():
    pieces = tokenizer("pieces")
    ids = pieces.get_vocab()
    pairs = of(pieces, tokenizer("digits"))
    assert ids["a"] in pairs
    assert ids["<0x61>"] not in pairs


def test_special_tokens_are_paired_by_their_text_and_the_end_of_turn_by_what_it_does():
    student, teacher = tokenizer("digits"), tokenizer("numbers")
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    assert special_pairs(student, teacher) == {ours["<think>"]: theirs["<think>"]}
    end = ours[END["digits"]], theirs[END["numbers"]]
    pairs = of(student, teacher, end)
    assert pairs[end[0]] == end[1]
    assert pairs[ours["<think>"]] == theirs["<think>"]
    # What ends a turn stands for nothing else.
    assert special_pairs(student, teacher, (ours["<think>"], end[1])) == {ours["<think>"]: end[1]}


def test_a_special_token_is_not_the_text_that_looks_like_it_and_an_unknown_is_not_another():
    student = tiny_tokenizer()
    teacher = tokenizer("digits")
    plain = tiny_tokenizer()
    plain.add_tokens([AddedToken("<think>", special=False)])
    assert plain.get_vocab()["<think>"] not in of(plain, teacher)
    assert tokenizer("pieces").get_vocab()["<unk>"] not in of(tokenizer("pieces"), tokenizer("digits"))
    assert of(student, teacher)[student.eos_token_id] == teacher.eos_token_id  # <|im_end|> in both


def test_ids_that_a_head_has_no_row_for_are_left_out():
    student, teacher = tokenizer("pieces"), tokenizer("digits")
    pairs = of(student, teacher, rows=(400, 300))
    assert pairs == {s: t for s, t in of(student, teacher).items() if s < 400 and t < 300}
    end = student.eos_token_id, teacher.eos_token_id
    assert end[0] not in of(student, teacher, end, rows=(400, 300))


def test_one_vocabulary_is_common_whole_with_its_padding_rows():
    assert of(tokenizer("pieces"), tokenizer("pieces"), rows=(1024, 1030)) == {i: i for i in range(1024)}
    exchanged = of(tiny_tokenizer(), tiny_tokenizer(), end=(256, 258), rows=(259, 259))
    assert exchanged == {i: i for i in range(259)} | {256: 258, 258: 256}


def test_the_end_of_turn_of_two_vocabularies_is_a_pair_though_the_ids_are_equal():
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    assert find_end_map(student, teacher) is None
    assert end_pair(student, teacher) == (258, 258)
