"""Sequences cut into micro-batches and padded, and the targets and weights of a batch, by hand."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd.data.sequences import TokenSequence, collate, cut, join
from gkd.data.targets import (
    IGNORE,
    find_targets,
    per_target,
    select_targets,
    sequence_weights,
    targets_of,
)


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
    batch = collate([join([1, 2], [3, 4, 5], "student", 0), join([6], [7], "data", 1)], 0)
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
