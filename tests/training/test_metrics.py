"""`Meter` and `Ledger` by themselves: means by source from sums, ranks that merge, and what was trained on."""

import pytest
import torch

from gkd.data.sequences import TokenSequence
from gkd.loss.settings import FusedOutput
from gkd.loss.signals import IN_FULL, IN_TEXT, NOT_COMPARED
from gkd.training.metrics import PHASES, Meter
from gkd.training.record import Ledger

DATA, STUDENT, TEACHER = 0, 1, 2


def output(divergence, agreement=None, cross_entropy=None, **aligned):
    """The per-target values of a fused pass; entropies and log-probabilities are multiples of the divergence."""
    values = torch.tensor(divergence)
    return FusedOutput(
        loss=values.sum(),
        divergence=values,
        student_entropy=2 * values,
        teacher_entropy=3 * values,
        agreement=torch.tensor(agreement or [1.0] * len(divergence)),
        teacher_log_prob=-values,
        cross_entropy=None if cross_entropy is None else torch.tensor(cross_entropy),
        **aligned,
    )


def sequence(source, length, truncated=False):
    return TokenSequence([7] * (3 + length), [-100] * 3 + [7] * length, 3, source, truncated=truncated)


def flushed(meter):
    logs = meter.flush(lambda x: x, lambda x: x)
    return {name: value for name, value in logs.items() if not name.startswith("time/")}


def test_means_are_over_tokens_and_by_source():
    meter = Meter()
    meter.add_targets(output([1.0, 2.0, 6.0], [1.0, 0.0, 0.0]), torch.tensor([DATA, STUDENT, STUDENT]))
    meter.add_targets(output([3.0], [1.0]), torch.tensor([STUDENT]))
    logs = flushed(meter)
    assert logs["loss/data"] == 1.0
    assert logs["loss/student"] == pytest.approx((2 + 6 + 3) / 3)  # of three tokens, not of two batches
    assert logs["student/entropy"] == pytest.approx(2 * (1 + 2 + 6 + 3) / 4)
    assert logs["student/agreement"] == 0.5
    assert logs["student/agreement/student"] == pytest.approx(1 / 3)
    assert logs["teacher/log_prob/data"] == -1.0
    assert "loss" not in logs  # the Trainer's own
    assert not any(name.endswith("/teacher") for name in logs)  # it wrote nothing
    assert not any(name.startswith(("student/cross_entropy", "teacher/top_k_mass")) for name in logs)


def test_of_a_teacher_with_other_tokens_are_told_the_shares_and_what_it_says_where_it_stands():
    meter = Meter()
    kinds = torch.tensor([IN_FULL, IN_TEXT, IN_TEXT, NOT_COMPARED], dtype=torch.int8)
    stands = torch.tensor([True, True, False, False])
    said = output([1.0, 2.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0], kinds=kinds, at_border=stands)
    meter.add_targets(said, torch.tensor([DATA, DATA, DATA, STUDENT]))
    logs = flushed(meter)
    assert (logs["aligned/in_full"], logs["aligned/in_text"], logs["aligned/not_compared"]) == (0.25, 0.5, 0.25)
    assert (logs["aligned/in_full/data"], logs["aligned/not_compared/student"]) == (pytest.approx(1 / 3), 1.0)
    assert logs["student/agreement"] == 0.5  # at two places
    assert logs["teacher/entropy/data"] == pytest.approx(3 * 1.5)
    assert logs["teacher/log_prob"] == pytest.approx(-5 / 3)
    assert "teacher/log_prob/student" not in logs
    assert logs["loss/student"] == 0.0


def test_a_value_that_some_batches_lack_is_a_mean_over_those_that_have_it():
    meter = Meter()
    meter.add_targets(output([1.0, 1.0], cross_entropy=[4.0, 8.0]), torch.tensor([DATA, STUDENT]))
    meter.add_targets(output([1.0]), torch.tensor([DATA]))
    logs = flushed(meter)
    assert (logs["student/cross_entropy"], logs["student/cross_entropy/data"]) == (6.0, 4.0)


def test_each_of_several_teachers_has_its_own_means():
    meter = Meter(teachers=("math", "chat", "idle"))
    sources, teachers = torch.tensor([DATA, DATA, STUDENT]), torch.tensor([0, 1, 1])
    meter.add_targets(output([1.0, 2.0, 6.0], [1.0, 1.0, 0.0]), sources, teachers)
    logs = flushed(meter)
    assert logs["teacher/math/divergence"] == 1.0
    assert (logs["teacher/chat/divergence"], logs["teacher/chat/agreement"]) == (4.0, 0.5)
    assert not any(name.startswith("teacher/idle") for name in logs)


def test_rollouts_are_counted_by_source_and_over_what_was_written():
    meter = Meter()
    meter.add_sequence(sequence("data", 40), ended=True)
    meter.add_sequence(sequence("student", 4, truncated=True), ended=False, repetitive=True)
    meter.add_sequence(sequence("student", 8), ended=True)
    meter.add_sequence(sequence("teacher", 0), ended=True, empty=True)
    logs = flushed(meter)
    assert logs["lmbda_realised"] == 0.5
    assert (logs["rollout/length_mean/student"], logs["rollout/length_max/student"]) == (6.0, 8.0)
    assert logs["rollout/length_mean"] == 4.0  # of student and teacher: 4, 8, 0
    assert logs["rollout/length_max"] == 8.0  # the data's 40 tokens were not generated
    assert (
        logs["rollout/truncated/student"] == logs["rollout/repetitive/student"] == logs["rollout/ended/student"] == 0.5
    )
    assert logs["rollout/empty"] == pytest.approx(1 / 3)
    assert logs["rollout/length_mean/data"] == 40.0


def test_two_ranks_together_are_one_process_with_all():
    whole, ranks = Meter(), [Meter(), Meter()]
    parts = (([1.0, 5.0, 2.0], [DATA, STUDENT, TEACHER]), ([9.0], [STUDENT]))
    written = (("student", 5), ("student", 11))
    for rank, (values, sources), (source, length) in zip(ranks, parts, written, strict=True):
        for meter in (rank, whole):
            meter.add_targets(output(values), torch.tensor(sources))
            meter.add_sequence(sequence(source, length), ended=True)
    sent = []
    ranks[1].flush(lambda x: sent.append(x) or x, lambda x: sent.append(x) or x)
    logs = ranks[0].flush(lambda x: x + sent[0], lambda x: torch.maximum(x, sent[1]))
    assert {n: v for n, v in logs.items() if not n.startswith("time/")} == flushed(whole)
    assert logs["loss/student"] == 7.0


def test_a_period_begins_anew():
    meter = Meter()
    meter.add_targets(output([1.0]), torch.tensor([DATA]))
    meter.add_sequence(sequence("data", 4), ended=True)
    flushed(meter)
    assert flushed(meter) == {}


def test_a_phase_inside_another_is_counted_once(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0])  # rollout from 0 to 10, the teacher's from 1 to 4 inside
    monkeypatch.setattr("gkd.training.metrics._mark", lambda device: next(now))
    meter = Meter()
    with meter.phase("rollout"), meter.phase("teacher"):
        pass
    logs = meter.flush(lambda x: x, lambda x: x)
    times = {name: logs[f"time/{name}"] for name in PHASES if f"time/{name}" in logs}
    assert times == {"rollout": 7.0, "teacher": 3.0, "student": 0.0}


def test_the_ledger_adds_windows_and_comes_back_from_a_checkpoint():
    ledger = Ledger()
    ledger.add(torch.tensor([[1, 2, 0], [10, 25, 0]]))
    ledger.add(torch.tensor([[0, 1, 1], [0, 5, 4]]))
    state = ledger.as_dict()
    assert state == {
        "sequences": {"data": 1, "student": 3, "teacher": 1},
        "targets": {"data": 10, "student": 30, "teacher": 4},
    }
    again = Ledger()
    again.load(state)
    again.add(torch.tensor([[1, 0, 0], [2, 0, 0]]))
    assert (again.sequences["data"], again.targets["data"]) == (2, 12)
    assert ledger.as_dict() == state  # what was loaded is no view of the other
