"""Token maps are compared, not sizes; stop ids are the union of what models, tokenizers and templates say."""

import logging

import pytest
from datasets import Dataset
from tiny import CHATML, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from gkd.data.vocabulary import (
    check_ids_in_use,
    compare_chat_templates,
    compare_stop_ids,
    end_of_turn,
    shared_vocabulary,
    stop_token_ids,
)


def word_tokenizer(vocab):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab=vocab, unk_token="[u]")))


WORDS = {"[u]": 0, "a": 1, "b": 2, "c": 3}


def test_equal_heads_need_no_restriction(caplog):
    caplog.set_level(logging.INFO)
    assert shared_vocabulary(word_tokenizer(WORDS), word_tokenizer(WORDS), 4, 4) is None
    assert shared_vocabulary(word_tokenizer(WORDS), None, 8, 8) is None
    assert not caplog.records


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(151_936, 152_064), (152_064, 151_936)])
@pytest.mark.parametrize("teacher", [None, word_tokenizer(WORDS)])
def test_padded_heads_are_restricted_to_the_smaller_with_one_line(student_rows, teacher_rows, teacher, caplog):
    assert shared_vocabulary(word_tokenizer(WORDS), teacher, student_rows, teacher_rows) == 151_936
    assert len(caplog.records) == 1
    assert f"student {student_rows:,} rows, teacher {teacher_rows:,}" in caplog.text


def test_an_id_for_two_tokens_is_refused_though_sizes_agree():
    teacher = word_tokenizer({"[u]": 0, "a": 1, "x": 2, "y": 3})
    with pytest.raises(ValueError, match=r"student has 4 tokens, the teacher 4, and the first id .* is 2: 'b'"):
        shared_vocabulary(word_tokenizer(WORDS), teacher, 4, 4)


def test_both_sizes_both_tokens_and_the_remedy_are_named():
    teacher = word_tokenizer({"[u]": 0, "c": 1, "b": 2, "a": 3, "d": 4})
    with pytest.raises(ValueError) as error:
        shared_vocabulary(word_tokenizer(WORDS), teacher, 8, 8)
    for part in (
        "4 tokens",
        "teacher 5",
        "id that differs is 1",
        "'a' for the student, 'c' for the teacher",
        "family",
    ):
        assert part in str(error.value)


def test_a_token_that_moved_to_a_free_id_is_refused():
    teacher = word_tokenizer({"[u]": 0, "a": 1, "b": 2, "c": 5})
    with pytest.raises(ValueError, match="first id that differs is 3: 'c' for the student, None for the teacher"):
        shared_vocabulary(word_tokenizer(WORDS), teacher, 8, 8)


def test_maps_without_a_common_id_are_refused():
    teacher = word_tokenizer({"x": 7, "y": 8, "[v]": 9})
    with pytest.raises(ValueError, match="share no id"):
        shared_vocabulary(word_tokenizer(WORDS), teacher, 10, 10)


@pytest.mark.parametrize("bigger", ["student", "teacher"])
def test_extra_ids_on_one_side_are_fine_and_logged(bigger, caplog):
    caplog.set_level(logging.INFO)
    more = word_tokenizer({**WORDS, "<tool>": 4, "</tool>": 5})
    pair = (more, word_tokenizer(WORDS)) if bigger == "student" else (word_tokenizer(WORDS), more)
    assert shared_vocabulary(*pair, 8, 8) is None
    assert f"only the {bigger}'s tokenizer names 2 of the ids" in caplog.text


def test_added_tokens_count():
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    student.add_tokens(["<one>"])
    teacher.add_tokens(["<other>"])
    with pytest.raises(ValueError, match="first id that differs is 259: '<one>' for the student, '<other>'"):
        shared_vocabulary(student, teacher, 300, 300)


@pytest.mark.parametrize(("rows", "shared"), [((3, 3), None), ((4, 3), 3), ((3, 4), 3)])
@pytest.mark.parametrize("teacher", [None, word_tokenizer(WORDS)])
def test_ids_that_a_head_has_no_row_for_are_left_out(rows, shared, teacher, caplog):
    """As in Gemma-3-1B (both heads end before the token for images), or with a [PAD] that one side has got."""
    caplog.set_level(logging.INFO)
    assert shared_vocabulary(word_tokenizer(WORDS), teacher, *rows) == shared
    assert "names an id (3 'c')" in caplog.text


def padded(token, **special):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": token, **special})
    return tokenizer


def test_a_pad_token_at_the_end_may_be_another_on_the_other_side():
    """[PAD] and <pad> of one family, each added behind the same 259 tokens."""
    assert shared_vocabulary(padded("[PAD]"), padded("<pad>"), 264, 264) == 259
    teacher = tiny_tokenizer()
    teacher.add_tokens(["<think>", "</think>"])
    assert shared_vocabulary(padded("[PAD]"), teacher, 264, 264) == 259
    for same_but_in_use in ({"eos_token": "[PAD]"}, {"unk_token": "[PAD]"}):
        with pytest.raises(ValueError, match="first id that differs is 259: '\\[PAD\\]'"):
            shared_vocabulary(padded("[PAD]", **same_but_in_use), teacher, 264, 264)


@pytest.mark.parametrize("column", ["input_ids", "prompt_ids"])
@pytest.mark.parametrize(
    ("heads", "shared", "why"),
    [
        ({"student": 259, "teacher": 259}, None, "student's output head has 259 rows.*resize_token_embeddings"),
        ({"student": 260, "teacher": 259}, 259, "teacher's output head has 259 rows.*without the tokens that were"),
        ({"student": 264, "teacher": 264}, 259, "not the same token"),
    ],
)
def test_a_row_with_such_an_id_is_refused(column, heads, shared, why):
    tokenizer = padded("[PAD]")
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3], [4]], "prompt_ids": [[1, 2], [3], []]})
    check_ids_in_use({"train": rows, "eval": None}, (258,), tokenizer, heads, shared)
    bad = Dataset.from_list([*rows, {**rows[0], column: [4, 259]}])
    with pytest.raises(ValueError, match=rf"row 3 of the prepared eval data set holds id 259 \('\[PAD\]'\), .*{why}"):
        check_ids_in_use({"train": rows, "eval": bad}, (258,), tokenizer, heads, shared)
    check_ids_in_use({"train": bad}, (258,), tokenizer, {"student": 260, "teacher": 260}, None)


@pytest.mark.parametrize("column", ["teacher_context", "teacher_prompt_ids"])
def test_what_the_teacher_alone_reads_need_only_be_its_own_token(column):
    rows = Dataset.from_list([{"input_ids": [1, 2], "prompt_ids": [], column: own} for own in ([], [3, 265])])
    check_ids_in_use({"train": rows}, (258,), tiny_tokenizer(), {"student": 259, "teacher": 266}, 259)
    with pytest.raises(ValueError, match=r"row 1 of the prepared train data set holds id 265 in the teacher's prompt"):
        check_ids_in_use({"train": rows}, (258,), tiny_tokenizer(), {"student": 259, "teacher": 265}, 259)


def test_a_stop_token_that_a_side_does_not_know_is_refused():
    with pytest.raises(
        ValueError, match=r"the student's stop token is id 259 .*the teacher's output head has 259 rows"
    ):
        check_ids_in_use({}, (258, 259), padded("[PAD]"), {"student": 260, "teacher": 259}, 259)


# -------------------------------------------------------------------------------------------------------- stop ids


@pytest.mark.parametrize(
    ("configured", "expected"),
    [(None, (258,)), (256, (256, 258)), ([257, 256], (256, 257, 258)), ([258, 258], (258,))],
)
def test_stop_ids_are_a_sorted_union(configured, expected):
    config = GenerationConfig(eos_token_id=configured)
    assert stop_token_ids(tiny_tokenizer(), config) == expected


def test_stop_ids_without_a_generation_config():
    assert stop_token_ids(tiny_tokenizer(chat_template=None), None) == (258,)


def test_a_base_models_eos_is_joined_by_the_templates_end_of_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=256)) == (256, 258)


@pytest.mark.parametrize(
    ("template", "closing", "kept", "token_id"),
    [
        (CHATML, "<|im_end|>\n", "<|im_end|>", 258),
        (CHATML + "{{ '<|endoftext|>' }}", "<|im_end|>\n<|endoftext|>", "<|im_end|>", 258),
        (CHATML.replace("<|im_end|>\n' }}", " <|im_end|>' }}"), " <|im_end|>", " <|im_end|>", 258),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "\n", "", None),
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "", "", None),
        ("{% for m in messages %}{{ m.role + m.content + ' End' }}{% endfor %}", " End", "", None),
    ],
)
def test_end_of_turn_is_the_special_token_behind_the_answer(template, closing, kept, token_id):
    turn = end_of_turn(tiny_tokenizer(chat_template=template))
    assert (turn.closing, turn.kept, turn.token_id) == (closing, kept, token_id)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ 'no messages' }}"])
def test_no_end_of_turn(template):
    assert end_of_turn(tiny_tokenizer(chat_template=template)) is None


def test_different_stop_ids_are_named():
    tokenizer = tiny_tokenizer()
    assert compare_stop_ids((256, 258), (258, 256), tokenizer) is None
    warning = compare_stop_ids((256,), (258,), tokenizer)
    assert "student 256 (<|endoftext|>); of the teacher 258 (<|im_end|>)" in warning
    assert "seq_kd" in warning


def test_different_chat_templates_are_shown():
    student = tiny_tokenizer()
    assert compare_chat_templates(student, tiny_tokenizer(pad_is_eos=True)) is None
    assert compare_chat_templates(student, tiny_tokenizer(chat_template=None)) is None
    assert compare_chat_templates(student, tiny_tokenizer(chat_template="{{ raise_exception('no') }}")) is None
    warning = compare_chat_templates(student, tiny_tokenizer(chat_template=CHATML.replace("assistant", "model")))
    assert "student's writes '<|im_start|>user" in warning
    assert "<|im_start|>model" in warning
