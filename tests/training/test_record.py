"""The record of a training: what a checkpoint keeps of it comes back whole."""

import json

import torch

from gkd.training.position_profile import PositionProfile
from gkd.training.record import Record

COUNTS = torch.tensor([[1, 2, 0], [10, 20, 0]])  # sequences and targets: data, student, teacher


def made():
    record = Record(PositionProfile())
    record.ledger.add(COUNTS)
    record.ledger.add(COUNTS)
    record.tokens, record.nonfinite_steps, record.empty_steps = 75, 3, 1
    record.profile.add(torch.tensor([0.5]), torch.tensor([1]), torch.tensor([4]), 0, 2)
    record.profile.flush(lambda values: values)
    return record


def test_the_ledger_counts_by_source():
    ledger = made().ledger.as_dict()
    assert ledger["sequences"] == {"data": 2, "student": 4, "teacher": 0}
    assert ledger["targets"] == {"data": 20, "student": 40, "teacher": 0}


def test_what_a_checkpoint_keeps_comes_back_and_is_gone_on_with():
    kept = json.loads(json.dumps(made().as_dict()))
    record = Record(PositionProfile())
    record.load(kept)
    assert record.as_dict() == made().as_dict()
    record.ledger.add(COUNTS)
    assert record.ledger.targets["student"] == 60
    assert kept["ledger"]["targets"]["student"] == 40  # a copy: what was kept stays


def test_a_checkpoint_from_before_steps_were_counted():
    record = made()
    record.load({"ledger": made().ledger.as_dict(), "num_tokens": 5})
    assert (record.tokens, record.nonfinite_steps, record.empty_steps) == (5, 0, 0)
