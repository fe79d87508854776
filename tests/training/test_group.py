"""rollout_every: one rollout for several optimizer steps, and a resume inside such a group."""

import json

import pytest
import torch
from datasets import Dataset
from resumed import build, history, weights
from served import trainer_with
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, logged, trainer_of
from vllm_server.fake import FakeServer

from gkd.config.fields import GKDConfig
from gkd.data.sources import choose_sources
from gkd.rollouts.adapter_upload import version_of
from gkd.rollouts.hf import HFRollout
from gkd.servers.client import ServerError
from gkd.training import group as groups

STEPS = 7
LR = {"learning_rate": 0.5}  # so that a step changes what the student writes


def first_steps(every):
    """Where groups begin in two epochs of five windows, of which seven are trained on."""
    return {1: [0, 1, 2, 3, 4, 5, 6], 3: [0, 0, 0, 3, 3, 5, 5]}[every]


@pytest.mark.parametrize("every", [1, 3])
def test_completions_are_of_the_weights_that_a_group_began_with(tmp_path, monkeypatch, every):
    """The oracle: each row alone, greedily, by a copy of the student at the group's first step."""
    values = {"lmbda": 0.5, "temperature": 0.0, "max_steps": STEPS, "rollout_every": every, **LR}
    trainer = trainer_of(tmp_path, Dataset.from_list(tiny_rows(20)), **values)
    seen, copies, calls = Remember(monkeypatch), [], []
    rollout = trainer.rollouts["student"]
    generate = rollout.generate

    def counted(prompts, step, rows, teachers):
        calls.append((step, rows))
        copies.append((step, tiny_model(seed=1)))
        copies[-1][1].load_state_dict(trainer.model.state_dict())
        return generate(prompts, step, rows, teachers)

    rollout.generate = counted
    trainer.train()
    firsts = first_steps(every)
    assert [step for step, _ in calls] == sorted(set(firsts))
    assert all(len(set(numbers)) == len(numbers) for _, numbers in calls), "each row draws by a number of its own"
    changed = 0
    for at, window in enumerate(seen.windows):
        assert [s.source for s in window] == choose_sources(5, at, 4, 0.5)
        for sequence in (s for s in window if s.source == "student"):
            said = {}
            for step, student in copies:
                alone = HFRollout(lambda student=student: student, None, rollout.settings, seed=0)
                (said[step],) = alone.generate([sequence.prompt], 0)
            assert sequence.input_ids[sequence.prompt_length :] == said[firsts[at]]
            changed += len(set(map(tuple, said.values()))) > 1
    assert changed > 0, "the weights did not move enough to tell"
    ages = [at - first for at, first in enumerate(firsts)]
    assert logged(trainer, "rollout/staleness") == (ages if every > 1 else [])


def test_rows_and_sources_are_those_of_a_run_without_groups(tmp_path, monkeypatch):
    """Also what a step samples that begins a group, and what the data and a frozen, greedy teacher say."""
    windows = []
    for every in (1, 2):
        seen = Remember(monkeypatch)
        values = {"seq_kd": True, "teacher_temperature": 0.0, "teacher_cache_dir": "off", "max_steps": 4}
        values |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "rollout_every": every}
        trainer_of(
            tmp_path / str(every), Dataset.from_list(tiny_rows(16)), lmbda="0.25@0 0.75@4", **values, **LR
        ).train()
        windows.append([[(s.row, s.source, s.input_ids) for s in window] for window in seen.windows])
        monkeypatch.undo()
    for step, (alone, together) in enumerate(zip(*windows, strict=True)):
        assert [one[:2] for one in alone] == [one[:2] for one in together]
        for one, other in zip(alone, together, strict=True):
            if one[1] == "teacher" or step == 0:
                assert one == other
    assert windows[0] != windows[1]


SCENE = {
    "rollout_every": 3, "max_steps": 8, "save_steps": 1, "gradient_accumulation_steps": 3, "rows": 25, "views": True,
    "per_device_train_batch_size": 2, "lmbda": "0.3@0 0.9@8", "seq_kd": True, "teacher_cache_dir": "off",
    "teacher_temperature": 1.0, "max_new_tokens": "3@0 6@8", "temperature": "1.2@0 0.6@8", "lora_dropout": 0.3,
    "learning_rate": 0.05,
}  # fmt: skip


def test_a_resume_at_each_place_of_a_group_is_no_stop(tmp_path):
    """Groups of three, three times: two cut off by the end of an epoch of five windows."""
    whole = build(tmp_path / "whole", **SCENE)
    whole.train()
    kept = [(tmp_path / "whole" / f"checkpoint-{step}" / "pending_rollouts_0.json").is_file() for step in range(1, 9)]
    assert kept == [True, True, False, True, False, True, True, False]
    for step in (1, 2, 4, 6):
        torch.manual_seed(step)
        resumed = build(tmp_path / f"from-{step}", **SCENE)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert history(resumed) == history(whole)
        assert resumed.ledger.as_dict() == whole.ledger.as_dict()
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(resumed)[name]), (step, name)


def test_a_step_that_a_server_ended_is_made_with_the_completions_that_it_had(tmp_path):
    values = {"rollout_every": 3, "max_steps": 4, "lmbda": 0.5, "save_steps": 100}
    whole = build(tmp_path / "whole", **values)
    whole.train()
    first = build(tmp_path / "parts", **values)
    score = first.teacher.score

    def fails(batch):
        if first.state.global_step == 2:
            raise ServerError("gone")
        return score(batch)

    first.teacher.score = fails
    with pytest.raises(ServerError, match="gone"):
        first.train()
    second = build(tmp_path / "parts", **values)
    calls = []
    generate = second.rollouts["student"].generate
    second.rollouts["student"].generate = lambda *args: calls.append(args[1]) or generate(*args)
    second.train(resume_from_checkpoint=True)
    assert calls == [3]
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())


def test_what_is_pending_is_given_up_where_it_is_not_wanted(tmp_path, caplog):
    """Another number of ranks, no groups any more, other rows; a file that somebody has changed is refused."""
    values = {"rollout_every": 3, "max_steps": 2, "save_steps": 1, "lmbda": 1.0}
    trainer = build(tmp_path / "run", **values)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    assert groups.read(str(folder), 0, 1).holds(1)
    assert groups.read(str(folder), 1, 1) is None
    assert groups.read(str(folder), 0, 2) is None
    assert "of 1 ranks, not of 2" in caplog.text
    for changed in ({"rollout_every": 1}, {"ignore_data_skip": True}):
        other = build(tmp_path / "other", **{**values, **changed})
        other.stream.resume(str(folder))
        assert other.stream._group is None
    (folder / "pending_rollouts_0.json").write_text(json.dumps({"ranks": 1}))
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*pending_rollouts_0.json cannot be gone on from"):
        groups.read(str(folder), 0, 1)


def test_a_server_gets_an_adapter_for_each_group(tmp_path):
    with FakeServer(tiny_model(seed=1), tiny_tokenizer(), max_model_len=300) as server:
        values = {"rollout_backend": "vllm", "rollout_server_url": server.url, "teacher_top_k": None, "seq_kd": False}
        trainer = trainer_with(
            tmp_path, tiny_model(hidden=48, layers=3, seed=2), rollout_every=3, max_steps=4, **values
        )
        trainer.train()
        asked = [body for path, body in server.seen if path == "/v1/completions" and body["max_tokens"] > 1]
        assert list(dict.fromkeys(version_of(body["model"]) for body in asked)) == [0, 3]
        assert logged(trainer, "rollout/staleness") == [0, 1, 2, 0]
        assert max(logged(trainer, "rollout/logprob_gap")[::3]) < 1e-4


SERVER = {"rollout_backend": "vllm", "rollout_server_url": "http://localhost:1"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout_every": 0}, r"rollout_every=0"),
        ({"rollout_every": 2, "lmbda": 0}, r"rollout_every=2 has no effect with lmbda=0 and without seq_kd"),
        ({"rollout_every": 4, "rollout_staleness": 1, **SERVER}, r"rollout_staleness=1: .* up to 7 steps old"),
        ({"rollout_every": 2, "lmbda": "auto"}, r"rollout_every=2 decides who writes .* lmbda=auto changes"),
        ({"rollout_every": 2, "collapse_guard": "lower_lmbda"}, r"collapse_guard='lower_lmbda' changes that"),
        (
            {"rollout_every": 2, "reward_weight": 0.1, "temperature": 1},
            r"rollout_every=2 does not go with reward_weig",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        GKDConfig(output_dir=str(tmp_path), report_to=[], **values)
    assert "\n" not in str(caught.value)
    GKDConfig(output_dir=str(tmp_path), report_to=[], rollout_every=2, lmbda=0, seq_kd=True)


def test_what_is_sampled_by_hand_cannot_change_inside_a_group(tmp_path):
    with pytest.raises(ValueError, match=r"lmbda cannot change with rollout_every=2"):
        trainer_of(tmp_path, rollout_every=2).lmbda = 0.25
