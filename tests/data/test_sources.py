"""How many rows each source gets, exactly and in expectation, and which sources a config knows of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.config.fields import GKDConfig
from gkd.data.sources import MIXINGS, SOURCES, choose_sources


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("seq_kd", [False, True])
def test_lmbda_zero_and_one_are_exact(mixing, seq_kd):
    other = "teacher" if seq_kd else "data"
    for step in range(2000):
        assert choose_sources(1, step, 5, 0.0, seq_kd, mixing) == [other] * 5
        assert choose_sources(1, step, 5, 1.0, seq_kd, mixing) == ["student"] * 5


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(0, 64), st.floats(0, 1))
def test_the_share_of_every_step_is_lmbda_rounded(seed, step, num_rows, lmbda):
    count = choose_sources(seed, step, num_rows, lmbda).count("student")
    assert math.floor(lmbda * num_rows - 1e-6) <= count <= math.ceil(lmbda * num_rows + 1e-6)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("lmbda", [0.1, 0.3, 0.77])
def test_expectation_is_exact(mixing, lmbda):
    rows, steps = 3, 10_000
    share = sum(choose_sources(7, s, rows, lmbda, mixing=mixing).count("student") for s in range(steps)) / (
        rows * steps
    )
    # the variance of one step's share is at most lmbda (1 - lmbda) (the coin), so three sigma of the mean:
    assert abs(share - lmbda) < 3 * math.sqrt(lmbda * (1 - lmbda) / steps)


def test_every_row_is_chosen_equally_often():
    counts = [0] * 8
    for step in range(4000):
        for row, source in enumerate(choose_sources(3, step, 8, 0.25)):
            counts[row] += source == "student"
    assert max(counts) - min(counts) < 6 * math.sqrt(4000 * 0.25 * 0.75)


def test_batch_mixing_is_one_coin():
    steps = [choose_sources(0, step, 6, 0.5, mixing="batch") for step in range(200)]
    assert all(len(set(step)) == 1 for step in steps)
    assert {step[0] for step in steps} == {"student", "data"}


@pytest.mark.parametrize(("lmbda", "mixing", "match"), [(1.5, "sample", "lmbda=1.5"), (0.5, "coin", "mixing='coin'")])
def test_wrong_values_are_named(lmbda, mixing, match):
    with pytest.raises(ValueError, match=match):
        choose_sources(0, 0, 4, lmbda, mixing=mixing)


def test_sources_are_the_three_words():
    assert SOURCES == ("data", "student", "teacher")


@pytest.mark.parametrize("seq_kd", [False, True])
@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_the_config_knows_which_sources_occur(tmp_path, lmbda, seq_kd):
    """`student_writes`, `teacher_writes` and `reads_answers` against what is drawn over many steps."""
    config = GKDConfig(output_dir=str(tmp_path), report_to=[], lmbda=lmbda, seq_kd=seq_kd)
    drawn = {source for step in range(50) for source in choose_sources(0, step, 4, lmbda, seq_kd)}
    known = {"student": config.student_writes, "teacher": config.teacher_writes, "data": config.reads_answers}
    assert {source for source, occurs in known.items() if occurs} == drawn
