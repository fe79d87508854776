"""num_completions: several rows of a step go on from one prompt."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from served import trainer_with
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, config, dense_loss, logged, losses, trainer_of
from vllm_server.fake import FakeServer

from gkd.config.fields import GKDConfig
from gkd.training.trainer import GKDTrainer

VALUES = {"lmbda": 1.0, "temperature": 1.0, "num_completions": 2}


def prompts_of(window):
    """[(row, its completions)] in the order of the window."""
    found = {}
    for sequence in window:
        found.setdefault(sequence.row, []).append(tuple(sequence.input_ids[sequence.prompt_length :]))
    return list(found.items())


def test_rows_of_a_step_share_prompts_and_nothing_else(tmp_path, monkeypatch):
    """Epochs of seven prompts, four rows a micro-batch and two of these a step: 4 + 3 prompts; each prompt is read
    once, each completion is its own, the loss is that of the definition."""
    seen = Remember(monkeypatch)
    values = VALUES | {"gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 0.0}
    trainer = trainer_of(tmp_path, Dataset.from_list(tiny_rows(7)), **values)
    trainer.train()
    assert [len(window) for window in seen.windows] == [8, 6, 8, 6]
    assert trainer.state.epoch == 2
    for epoch in (seen.windows[:2], seen.windows[2:]):
        pairs = [pair for window in epoch for pair in prompts_of(window)]
        assert sorted(row for row, _ in pairs) == list(range(7))
        assert all(len(completions) == 2 and len(set(completions)) == 2 for _, completions in pairs)
    for window, loss in zip(seen.windows, losses(trainer), strict=True):
        assert {sequence.source for sequence in window} == {"student"}
        expected = dense_loss(trainer.model, trainer.teacher_model, window)
        assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_a_server_is_asked_once_for_a_prompt(tmp_path, monkeypatch):
    with FakeServer(tiny_model(seed=1), tiny_tokenizer(), max_model_len=300) as server:
        seen = Remember(monkeypatch)
        urls = {"rollout_backend": "vllm", "rollout_server_url": server.url, "teacher_top_k": None, "seq_kd": False}
        values = {**urls, **VALUES, "num_completions": 4, "max_steps": 2, "rollout_every": 2}
        trainer = trainer_with(tmp_path, tiny_model(hidden=48, layers=3, seed=2), **values)
        trainer.train()
        asked = [body for path, body in server.seen if path == "/v1/completions" and body["max_tokens"] > 1]
    batch = trainer.args.per_device_train_batch_size
    assert [body["n"] for body in asked] == [4] * (2 * batch // 4)
    for window in seen.windows:
        assert [len(set(completions)) for _, completions in prompts_of(window)] == [4] * (batch // 4)
    assert max(logged(trainer, "rollout/logprob_gap")[:1]) < 1e-4, "what is said of each token is said of that one"


def test_the_baseline_of_a_reward_is_the_prompts_other_completions(tmp_path, monkeypatch):
    seen = Remember(monkeypatch)
    values = VALUES | {"num_completions": 4, "per_device_train_batch_size": 8, "reward_weight": 0.5}
    trainer = GKDTrainer(
        tiny_model(seed=1),
        tiny_model(hidden=48, layers=3, seed=2),
        config(tmp_path, **values),
        train_dataset=Dataset.from_list(tiny_rows(4)),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2),
        reward=lambda completion, row: float(len(completion) + len(row["messages"][-1]["content"])),
    )
    values = []
    value = trainer.reward._value
    monkeypatch.setattr(trainer.reward, "_value", lambda one: values.append(value(one)) or values[-1])
    trainer.train()
    (window,) = seen.windows
    assert len({sequence.row for sequence in window}) == 2
    for start in (0, 4):
        rewards = values[start : start + 4]
        expected = [0.5 * (one - (sum(rewards) - one) / 3) / 8 for one in rewards]
        assert [sequence.log_prob_weight for sequence in window[start : start + 4]] == pytest.approx(expected)
    assert len(set(values)) > 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_completions": 0}, r"num_completions=0"),
        ({"num_completions": 2}, r"num_completions=2 needs lmbda=1 in every step \(lmbda=0.5"),
        ({"num_completions": 2, "lmbda": 1, "collapse_guard": "lower_lmbda"}, r"num_completions=2 needs lmbda=1"),
        ({"num_completions": 3, "lmbda": 1}, r"num_completions=3 does not divide per_device_train_batch_size=8"),
        ({"num_completions": 2, "lmbda": 1, "temperature": 0}, r"num_completions=2 does not go with temperature=0"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        GKDConfig(output_dir=str(tmp_path), report_to=[], **values)
    assert "\n" not in str(caught.value)
