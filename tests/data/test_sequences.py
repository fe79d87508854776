"""Token functions: nothing of a prompt is a target, every completion token is one, padding is invisible."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd.data.sequences import TokenSequence, collate, cut, join, unpad
from gkd.data.sources import SOURCES
from gkd.data.targets import (
    IGNORE,
    find_targets,
    per_target,
    select_targets,
    sequence_weights,
    target_mask,
    targets_of,
)

token_lists = st.lists(st.integers(0, 9), min_size=1, max_size=12)
rows = st.lists(st.tuples(token_lists, token_lists, st.sampled_from(SOURCES)), min_size=1, max_size=7)


def sequences_of(drawn):
    return [join(p, c, source, row, False, True) for row, (p, c, source) in enumerate(drawn)]


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


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 4))
@settings(deadline=None)
def test_cut_sorts_and_loses_nothing(lengths, size):
    sequences = [TokenSequence([1] * n, [IGNORE] * n, 1, row=i) for i, n in enumerate(lengths)]
    sizes = [size] * (len(lengths) // size) + ([len(lengths) % size] if len(lengths) % size else [])
    micro_batches = cut(sequences, sizes)
    flat = [s for batch in micro_batches for s in batch]
    assert [len(batch) for batch in micro_batches] == sizes
    assert sorted(s.row for s in flat) == list(range(len(lengths)))
    assert [len(s.input_ids) for s in flat] == sorted(lengths, reverse=True)


def test_micro_batches_pad_to_their_own_longest_row():
    sequences = [TokenSequence([1] * n, [IGNORE] * n, 1) for n in (9, 2, 3, 8)]
    assert [collate(b, 0)["input_ids"].shape[1] for b in cut(sequences, [2, 2])] == [9, 3]
    assert collate(sequences, 0, multiple=8)["input_ids"].shape[1] == 16


def test_select_targets_and_weights_by_hand():
    batch = collate([join([1, 2], [3, 4, 5], "student", 0, False, True), join([6], [7], "data", 1, False, True)], 0)
    hidden = torch.arange(2 * 5).view(2, 5, 1)
    for targets in (targets_of(batch), find_targets(batch["labels"])):
        assert select_targets(hidden, targets).flatten().tolist() == [1, 2, 3, 5]
        weights = sequence_weights(batch["labels"], targets)
        torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
        assert per_target(batch["sources"], targets).tolist() == [1, 1, 1, 0]
        assert (targets.ids.tolist(), targets.places.tolist()) == ([3, 4, 5, 7], [1, 2, 3, 1])


def test_truncated_rows_can_be_left_out():
    sequence = join([1, 2], [3, 4], "student", 0, truncated=True, train=False)
    assert sequence.num_targets == 0
    assert sequence.completion_length == 2


def test_a_label_on_the_first_token_is_no_target():
    """Nothing predicts the first token, so it cannot be counted either."""
    assert TokenSequence([5, 6], [5, 6], 0).num_targets == 1
