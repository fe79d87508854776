"""The bytes of a vocabulary's ids make up what its tokenizer reads; what cannot be said so is refused."""

import pytest
from spellings import END, is_there, tokenizer
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gkd.data.token_bytes import spelled, token_bytes, unknown_id

TEXT = "  Two cats, 3,140 dogs.\n\n\tnaïve “日本語” 👩‍👩‍👧 cafe\u0301 \x00\u200b"


@pytest.mark.parametrize("kind", ["pieces", "digits", "numbers", "smollm2"])
def test_tokens_of_a_text_are_its_bytes(kind):
    if not is_there(kind):
        pytest.skip("SmolLM2's tokenizer is not there (make fetch)")
    table = token_bytes(tokenizer(kind))
    written = b"".join(spelled(table, tokenizer(kind)(TEXT, add_special_tokens=False)["input_ids"]))
    blank = b" " if kind == "pieces" else b""
    assert written == blank + TEXT.encode()


def test_every_byte_of_a_byte_level_vocabulary_is_there_once():
    table = token_bytes(tiny_tokenizer())
    assert sorted(table[:256]) == [bytes([byte]) for byte in range(256)]
    assert table[256:] == [None] * 3


def test_bytes_and_blanks_of_sentencepiece():
    pieces = tokenizer("pieces")
    table, ids = token_bytes(pieces), pieces.get_vocab()
    assert table[ids["<0x0A>"]] == b"\n"
    assert table[ids["<0xE6>"]] == b"\xe6"
    assert table[ids["▁the"]] == b" the"
    assert table[ids["▁"]] == b" "


def test_special_tokens_and_the_unknown_have_no_bytes_and_rows_behind_the_vocabulary_neither():
    pieces = tokenizer("pieces")
    table, ids = token_bytes(pieces), pieces.get_vocab()
    assert table[ids["<unk>"]] is table[ids["<s>"]] is table[ids[END["pieces"]]] is None
    assert spelled(table, [len(table), 10**6]) == [None, None]
    assert unknown_id(pieces) == ids["<unk>"]
    # A byte-level tokenizer lacks nothing, whatever it calls its unk token.
    named = tiny_tokenizer()
    named.unk_token = "<|endoftext|>"
    assert unknown_id(named) is None


def test_an_added_token_that_is_not_special_is_its_own_text():
    with_thoughts = tiny_tokenizer()
    with_thoughts.add_tokens([AddedToken("<think>", special=False), AddedToken("é  ", special=False)])
    table, ids = token_bytes(with_thoughts), with_thoughts.get_vocab()
    assert table[ids["<think>"]] == b"<think>"
    assert table[ids["é  "]] == "é  ".encode()


def word_piece():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def small_letters():
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def ends_of_words():
    return Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        (word_piece, "is a WordPiece tokenizer, whose tokens do not say where blanks stand"),
        (small_letters, "writes 'Two  cats, and 3,140 dogs.' as 'two  cats"),
        (ends_of_words, "marks the parts of words"),
    ],
)
def test_what_does_not_write_its_bytes_is_refused_with_the_remedy(backend, why):
    with pytest.raises(ValueError, match=why) as error:
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend(), name_or_path="some/teacher"))
    assert "some/teacher" in str(error.value)
    assert "teacher_tokenizer_alignment='bytes'" in str(error.value)
    assert "seq_kd" in str(error.value)
