"""rollout_staleness=1: a server samples the next step's completions, from weights one step old, during this step."""

import copy
import threading

import pytest
import torch
from served import AtStep, rollout_of, student_of, trainer_with
from tiny import tiny_model, tiny_tokenizer
from training import config, logged
from vllm_server.fake import FakeServer

import gkd.training.trainer
from gkd.rollouts.adapter_upload import version_of
from gkd.rollouts.hf import HFRollout
from gkd.servers import client as vllm_client
from gkd.servers.client import ServerError

PROMPTS = [[5, 9, 40], [7], [100, 3, 3, 8, 50, 61, 7], [200, 2]]
ROWS = [0, 1, 2, 3]
TEACHER = {"hidden": 48, "layers": 3, "seed": 2}


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.005)


@pytest.fixture
def server():
    with FakeServer(tiny_model(seed=1), tiny_tokenizer(), max_model_len=300) as server:
        yield server


@pytest.fixture
def windows(monkeypatch):
    """Every trained window: (row, source, ids) of its sequences."""
    seen = []

    def count(sequences, original=gkd.training.trainer.count):
        seen.append([(s.row, s.source, tuple(s.input_ids)) for s in sequences])
        return original(sequences)

    monkeypatch.setattr(gkd.training.trainer, "count", count)
    return seen


def stale_trainer(folder, server, **values):
    urls = {"rollout_backend": "vllm", "rollout_server_url": server.url, "rollout_staleness": 1, "teacher_top_k": None}
    return trainer_with(folder, tiny_model(**TEACHER), **(urls | {"max_steps": 6, "seq_kd": False} | values))


def sampled(server):
    """The name of the adapter that each rollout asked for; the comparison of weights asks for one token."""
    return [body["model"] for path, body in server.seen if path == "/v1/completions" and body["max_tokens"] > 1]


def flip(student):
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.mul_(-1.2)


def test_what_is_asked_for_ahead_comes_from_the_weights_of_that_moment(server, tmp_path):
    student = student_of()
    rollout = rollout_of(server, tmp_path, student, temperature=0)
    reference = HFRollout(lambda: student, None, rollout.settings, seed=4)
    rollout.generate(PROMPTS, 3, ROWS)
    assert rollout.age == 0
    expected = reference.generate(PROMPTS, 4, ROWS)
    rollout.generate_ahead(PROMPTS, 4, ROWS)
    flip(student)
    fresh = reference.generate(PROMPTS, 4, ROWS)
    assert fresh != expected
    assert rollout.generate(PROMPTS, 4, ROWS) == expected
    assert (rollout.age, version_of(sampled(server)[-1])) == (1, 3)
    assert rollout.generate(PROMPTS, 4, ROWS) == fresh
    assert (rollout.age, version_of(sampled(server)[-1])) == (0, 4)


def test_what_is_forgotten_is_asked_for_anew(server, tmp_path):
    student = student_of()
    rollout = rollout_of(server, tmp_path, student, temperature=0)
    rollout.generate(PROMPTS, 0, ROWS)
    rollout.generate_ahead(PROMPTS, 1, ROWS)
    rollout.forget()
    flip(student)
    expected = HFRollout(lambda: student, None, rollout.settings, seed=4).generate(PROMPTS[:2], 1)
    assert rollout.generate(PROMPTS[:2], 1) == expected
    assert rollout.age == 0


def test_other_rows_than_those_asked_for_are_a_fault_of_ours(server, tmp_path):
    rollout = rollout_of(server, tmp_path, student_of())
    rollout.generate_ahead(PROMPTS, 1, ROWS)
    rollout._ahead.future.result()
    with pytest.raises(AssertionError, match="asked for ahead"):
        rollout.generate(PROMPTS, 1, ROWS[::-1])


def test_a_training_samples_one_step_behind(server, tmp_path, windows):
    """Two epochs of four steps: the weights are those of the step before, but for each epoch's first step; rows and
    sources are those of a training without, and so are the first rollouts."""
    trainer = stale_trainer(tmp_path / "a", server)
    trainer.train()
    ages = [0, 1, 1, 1, 0, 1]
    assert logged(trainer, "rollout/staleness") == ages
    versions = list(dict.fromkeys(version_of(name) for name in sampled(server)))
    assert versions == [0, 1, 2, 4]
    by_version = [[version_of(name) for name in sampled(server)].count(version) for version in versions]
    assert by_version == [4, 2, 2, 4], "two rows of each step are the student's"
    loads = [body["lora_name"] for path, body in server.seen if path == "/v1/load_lora_adapter"]
    assert sorted(map(version_of, loads)) == [0, 1, 2, 4], "each adapter was loaded once: none was lost while in use"
    stale = [*windows]
    windows.clear()
    fresh = stale_trainer(tmp_path / "b", server, rollout_staleness=0)
    fresh.train()
    assert logged(fresh, "rollout/staleness") == [0] * 6
    assert [[s[:2] for s in window] for window in stale] == [[s[:2] for s in window] for window in windows]
    assert stale[0] == windows[0]
    assert stale != windows


def test_what_is_asked_for_ahead_is_sampled_as_its_own_step_says(server, tmp_path, windows):
    texts = {"lmbda": "0.25@0 0.75@5", "max_new_tokens": "3@0 8@5", "temperature": "1@0 0.5@5"}
    trainer = stale_trainer(tmp_path, server, **texts)
    trainer.train()
    asked = [
        b for path, b in server.seen if path == "/v1/completions" and b.get("logprobs") == 0 and b["max_tokens"] > 1
    ]
    shares = [sum(source == "student" for _, source, _ in window) for window in windows]
    by_step = iter(asked)
    for step, share in enumerate(shares):
        assert abs(share - len(windows[step]) * (0.25 + 0.1 * step)) < 1
        for body in [next(by_step) for _ in range(share)]:
            assert (body["max_tokens"], body["temperature"]) == (3 + step, pytest.approx(1 - 0.1 * step))
    assert next(by_step, None) is None


def test_the_server_writes_while_the_step_is_trained(server, tmp_path):
    """Its answer for the second step waits until the first one is finished: were it waited for first, it would never
    come."""
    finished, waited = threading.Event(), []

    def answer_late(answer):
        waited.append(finished.wait(60))
        return answer

    trainer = stale_trainer(tmp_path, server, lmbda=1.0, max_steps=2)

    def hold_back():
        server.faults["/v1/completions"] = [answer_late]

    class Rollout(type(trainer.rollouts["student"])):
        def generate_ahead(self, *args):
            hold_back()
            super().generate_ahead(*args)

    trainer.rollouts["student"].__class__ = Rollout
    trainer.add_callback(AtStep(1, finished.set))
    trainer.train()
    assert waited == [True]


def test_a_resumed_run_loses_and_repeats_no_row(server, tmp_path, windows):
    """The rows looked at ahead are in no checkpoint; the first window after it is asked for anew, on-policy."""
    stale_trainer(tmp_path / "whole", server).train()
    whole = [*windows]
    windows.clear()
    stale_trainer(tmp_path / "a", server, max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = stale_trainer(tmp_path / "a", server)
    trainer.train(resume_from_checkpoint=True)
    assert [[s[:2] for s in window] for window in windows] == [[s[:2] for s in window] for window in whole]
    assert windows[:2] == whole[:2]
    assert logged(trainer, "rollout/staleness")[2:] == [0, 1, 0, 1]


def test_a_failure_in_the_background_surfaces_at_the_next_step(server, tmp_path, windows):
    """With the server's address, and with a checkpoint of the last finished step, from which it goes on."""
    whole = stale_trainer(tmp_path / "whole", server)
    whole.train()
    expected = [[s[:2] for s in window] for window in windows]
    windows.clear()
    trainer = stale_trainer(tmp_path / "a", server)
    trainer.add_callback(AtStep(1, lambda: server.faults.update({"/v1/completions": [400] * 50})))
    with pytest.raises(ServerError, match=rf"{server.url}/v1/completions answers HTTP 400"):
        trainer.train()
    assert trainer.state.global_step == 2, "the request that failed was made during step 2, for step 3"
    server.faults.clear()
    resumed = stale_trainer(tmp_path / "a", server)
    resumed.train(resume_from_checkpoint=True)
    assert [[s[:2] for s in window] for window in windows] == expected
    assert resumed.ledger.as_dict()["sequences"] == whole.ledger.as_dict()["sequences"]


def test_a_training_that_ends_early_leaves_nothing_pending(server, tmp_path):
    trainer = stale_trainer(tmp_path, server)

    def fail():
        raise RuntimeError("enough")

    trainer.add_callback(AtStep(2, fail))
    with pytest.raises(RuntimeError, match="enough"):
        trainer.train()
    assert trainer.rollouts["student"]._ahead is None


def test_weights_that_do_not_match_are_found_before_the_first_request(tmp_path):
    with FakeServer(tiny_model(seed=9), tiny_tokenizer(), max_model_len=300) as other:
        rollout = rollout_of(other, tmp_path, student_of())
        rollout.generate_ahead(PROMPTS, 1, ROWS)
        with pytest.raises(ValueError, match="does not hold the student's weights"):
            rollout.generate(PROMPTS, 1, ROWS)
        assert not sampled(other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout_staleness": 1}, r"rollout_staleness has no effect without rollout_backend='vllm'"),
        ({"rollout_staleness": 2}, r"rollout_staleness=2 is out of range"),
        ({"rollout_staleness": -1}, r"rollout_staleness=-1 is out of range"),
        ({"lmbda": 0.0, "fold_adapter": False}, r"fold_adapter=False has no effect"),
        (
            {"rollout_backend": "vllm", "rollout_server_url": "http://a", "fold_adapter": False},
            r"fold_adapter=False has no effect",
        ),
    ],
)
def test_fields_without_effect_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **values)


@pytest.mark.parametrize("fold", [True, False])
def test_the_adapter_is_folded_where_it_is_wanted(tmp_path, fold):
    trainer = trainer_with(tmp_path, copy.deepcopy(tiny_model(**TEACHER)), teacher_top_k=None, fold_adapter=fold)
    rollout = trainer.rollouts["student"]
    assert bool(rollout._layers_to_fold(trainer.model, PROMPTS)) == fold
