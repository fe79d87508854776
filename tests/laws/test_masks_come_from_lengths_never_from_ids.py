"""Law 4: masks come from lengths, never from ids.

A padding token that is also the stop token changes nothing, the stop token is trained, nothing of a prompt is.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import (
    ANSWER,
    PROMPT_TEXT,
    USER,
    ids,
    one,
    parts,
    prepare,
)
from tiny import tiny_rows, tiny_tokenizer

from gkd.data.sequences import PaddingCollator, collate, join, unpad
from gkd.data.sources import SOURCES
from gkd.data.targets import (
    target_mask,
)

token_lists = st.lists(st.integers(0, 9), min_size=1, max_size=12)


rows = st.lists(st.tuples(token_lists, token_lists, st.sampled_from(SOURCES)), min_size=1, max_size=7)


def sequences_of(drawn):
    return [join(p, c, source, row) for row, (p, c, source) in enumerate(drawn)]


@given(rows)
@settings(deadline=None)
def test_every_completion_token_is_one_target_and_no_prompt_token_is(drawn):
    batch = collate(sequences_of(drawn), pad_id=0)  # pad_id is also an ordinary token of the rows
    mask = target_mask(batch["labels"])
    assert mask.sum() == sum(len(completion) for _, completion, _ in drawn)
    for i, (prompt, completion, _) in enumerate(drawn):
        expected = [False] * (len(prompt) - 1) + [True] * len(completion)
        expected += [False] * (mask.shape[1] - len(expected))
        assert mask[i].tolist() == expected


@given(rows, st.booleans())
@settings(deadline=None)
def test_unpad_is_the_inverse_of_collate_on_either_side(drawn, left):
    sequences = sequences_of(drawn)
    batch = collate(sequences, pad_id=3)
    if left:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for name in ("input_ids", "attention_mask", "labels"):
            width = batch[name].shape[1]
            batch[name] = torch.stack(
                [torch.roll(row, width - n) for row, n in zip(batch[name], lengths, strict=True)]
            )
    for before, after in zip(sequences, unpad(batch), strict=True):
        assert (after.input_ids, after.labels, after.row) == (before.input_ids, before.labels, before.row)
        assert after.prompt_length == before.prompt_length  # found from the labels: the collator is a foreign one


@pytest.mark.parametrize("options", [{"pad_is_eos": True}, {"padding_side": "left"}])
def test_pad_token_and_padding_side_change_nothing(options):
    rows = tiny_rows(8)
    assert list(prepare(rows)[0]) == list(prepare(rows, tiny_tokenizer(**options))[0])


def test_padding_and_truncation_set_on_the_tokenizer_change_nothing():
    tokenizer = tiny_tokenizer()
    tokenizer(["a", "bcd"], padding="max_length", max_length=5, truncation=True)
    assert list(prepare(tiny_rows(4), tokenizer)[0]) == list(prepare(tiny_rows(4))[0])


def test_stop_and_pad_tokens_inside_prompt_and_answer_stay():
    text = "a<|im_end|>b<|endoftext|>c"
    row = {"messages": [{**USER, "content": text}, {**ANSWER, "content": text}]}
    prompt, targets = parts(one(row, tiny_tokenizer(pad_is_eos=True)))
    assert prompt == PROMPT_TEXT.replace("How many?", text)
    assert targets == [text + "<|im_end|>"]


text = st.text(
    alphabet=st.characters(codec="utf-8", exclude_characters="<|>", exclude_categories=("Cs",)), max_size=12
)


answers = text.filter(lambda t: t.strip())


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(text, answers), min_size=1, max_size=4), pad_is_eos=st.booleans(), every=st.booleans())
def test_targets_are_exactly_the_answers_with_their_stop_tokens(pairs, pad_is_eos, every):
    messages = [m for u, a in pairs for m in ({**USER, "content": u}, {**ANSWER, "content": a})]
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
    rows, report = prepare([{"messages": messages}], tokenizer, assistant_turns="all" if every else "last")
    trained = [a for _, a in pairs] if every else [pairs[-1][1]]
    assert report.target_tokens == sum(len(a.encode()) + 1 for a in trained)
    assert [label for label in rows[0]["labels"] if label != -100] == [i for a in trained for i in [*ids(a), 258]]
    padded = PaddingCollator(tokenizer.pad_token_id)([rows[0], {**rows[0], "input_ids": [1], "labels": [-100]}])
    assert int((padded["labels"] != -100).sum()) == report.target_tokens


def test_collator_pads_on_the_right_and_masks_by_length():
    features = [
        {"input_ids": [1, 258, 3], "labels": [-100, 258, 3], "prompt_length": 1, "row": 7},
        {"input_ids": [258], "labels": [-100], "prompt_length": 1, "row": 2, "teacher": 1, "prompt_ids": [5, 258]},
    ]
    batch = PaddingCollator(pad_id=258, pad_to_multiple_of=4)(features)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 258, 3, 258], [258, 258, 258, 258]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
        "labels": [[-100, 258, 3, -100], [-100, -100, -100, -100]],
        "prompt_lengths": [1, 1],
        "prompt_ids": [[-100, -100], [5, 258]],
        "rows": [7, 2],
        "teachers": [0, 1],
    }
    assert all(str(value.dtype) == "torch.int64" for value in batch.values())
    assert [sequence.prompt for sequence in unpad(batch)] == [[1], [5, 258]]
