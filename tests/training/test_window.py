"""A window by itself: rows that a rank repeats, and completions that take the place of what was there."""

import pytest
from windows import STOP, batches

from gkd.rollouts.base import Rollout
from gkd.rollouts.hygiene import Hygiene
from gkd.training.metrics import Meter
from gkd.training.window import count, measure, open_window, prompts_of, write_completions


class Writer(Rollout):
    """Writes the row's number in the step and the step, then stops; rows in `long` never do."""

    def __init__(self, long=()):
        self.calls, self.long = [], long

    def generate(self, prompts, step, rows=None, teachers=None):
        self.calls.append((prompts, step, rows))
        return [[30 + number, 60 + step, 7 if number in self.long else STOP] for number in rows]


def hygiene(**values):
    return Hygiene({"student": (STOP,), "teacher": (STOP,)}, max_new_tokens=3, **values)


def test_rows_that_the_last_round_repeats_become_fillers():
    """Seven rows on two ranks, two a batch: accelerate repeats row 0 behind row 6."""
    first = open_window(batches([0, 1], [4, 5]), 0, 2, rows_of_last=3)
    second = open_window(batches([2, 3], [6, 0]), 1, 2, rows_of_last=3)
    assert (first.total, second.total) == (7, 7)
    assert (first.indices, second.indices) == ([0, 1, 4, 5], [2, 3, 6])
    assert second.sizes == [2, 2]  # the filler has a place
    (filler,) = second.fillers
    assert (filler.input_ids, filler.num_targets, filler.row) == ([100], 0, 0)


def test_each_source_writes_its_rows_and_no_others():
    window = open_window(batches([0, 1], [4, 5]), 0, 2)
    sources = ["data", "student", "x", "x", "teacher", "student", "x", "x"]  # x: of the other rank
    assert prompts_of(window, sources, "student") == ([1, 3], [[101, 102], [105, 106]], [1, 5])
    writers = {"student": Writer(), "teacher": Writer()}
    written = write_completions(window, sources, writers, 3, hygiene())
    assert writers["student"].calls == [([[101, 102], [105, 106]], 3, [1, 5])]
    assert writers["teacher"].calls == [([[104, 105]], 3, [4])]
    assert [s.source for s in written] == ["data", "student", "teacher", "student"]
    assert [s.row for s in written] == [0, 1, 4, 5]
    assert written[0] is window.sequences[0]
    assert written[3].input_ids == [105, 106, 35, 63, STOP]
    assert written[3].labels == [-100, -100, 35, 63, STOP]
    assert window.sequences[3].source == "data"  # the window itself stays as it was opened


def test_a_rank_without_rows_of_a_source_asks_all_the_same():
    window = open_window(batches([0]), 0, 2)
    writers = {"student": Writer(), "teacher": Writer()}
    write_completions(window, ["data", "student"], writers, 0, hygiene())
    assert writers["student"].calls == [([], 0, [])]
    assert writers["teacher"].calls == []  # nobody needs it


@pytest.mark.parametrize("trained", [True, False])
def test_a_completion_that_is_cut_off_is_trained_on_only_where_that_is_wanted(trained):
    window = open_window(batches([0, 1]), 0, 1)
    rollouts = {"student": Writer(long=(1,))}
    written = write_completions(window, ["student"] * 2, rollouts, 0, hygiene(train_truncated=trained))
    assert [s.truncated for s in written] == [False, True]
    assert [s.num_targets for s in written] == [3, 3 if trained else 0]
    assert written[1].input_ids == [101, 102, 31, 60, 7]  # it is there, also where nothing of it is a target
    sequences = 2 if trained else 1
    assert count(written).tolist() == [[0, sequences, 0], [0, 3 * sequences, 0]]


def test_what_was_written_is_measured_by_source_whether_it_is_trained_on_or_not():
    window = open_window(batches([0, 1, 2]), 0, 1)
    writers = {"student": Writer(long=(1,)), "teacher": Writer()}
    written = write_completions(window, ["data", "student", "teacher"], writers, 0, hygiene(train_truncated=False))
    meter = Meter()
    measure(written, hygiene(), meter)
    logs = meter.flush(lambda x: x, lambda x: x)
    assert (logs["rollout/truncated/student"], logs["rollout/truncated/teacher"]) == (1, 0)
    assert (logs["rollout/ended/student"], logs["rollout/ended/teacher"]) == (0, 1)
    assert logs["rollout/length_mean/data"] == logs["rollout/length_mean/student"] == 3
    assert count(written).tolist() == [[1, 0, 1], [3, 0, 3]]  # nothing of the cut-off one is trained on
