"""What scripts touch of TRL's GKDTrainer beside its constructor: the same values; changes followed or refused."""

import pytest
import torch
from tiny import tiny_model
from training import trainer_of
from transformers import GenerationConfig, TrainerCallback
from trl.experimental.gkd import GKDTrainer as TheirTrainer

from gkd.training.trainer import GKDTrainer

ON_POLICY = {"lmbda": 1.0, "max_steps": 2, "save_strategy": "no"}


class AtStep(TrainerCallback):
    """Does something to the trainer behind its first step."""

    def __init__(self, action):
        self.action, self.trainer = action, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.action(self.trainer)


def trained(folder, action, **values):
    callback = AtStep(action)
    trainer = trainer_of(folder, callbacks=[callback], **{**ON_POLICY, **values})
    callback.trainer = trainer
    seen = []
    rollout = trainer.rollouts["student"]
    generate = rollout.generate

    def watched(prompts, step, rows, teachers):
        seen.append((rollout.settings, written := generate(prompts, step, rows, teachers)))
        return written

    rollout.generate = watched
    trainer.train()
    return trainer, [settings for settings, _ in seen], [written for _, written in seen]


@pytest.mark.parametrize("stops", [None, 7, [7, 9]])
def test_outputs_on_policy_are_theirs(stops):
    model = tiny_model(seed=1)
    prompts = torch.tensor([[258, 11, 12, 7], [10, 11, 9, 13]])
    inputs = {"prompts": prompts, "prompt_attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
    config = GenerationConfig(max_new_tokens=24, do_sample=True, pad_token_id=258, eos_token_id=stops, temperature=3.0)
    both = []
    for trainer in (GKDTrainer, TheirTrainer):
        torch.manual_seed(4)
        both.append(trainer.generate_on_policy_outputs(model, inputs, config))
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours, theirs)
    assert (both[0][2][:, :4] == -100).all()


def test_attributes_have_their_values(tmp_path):
    trainer = trainer_of(tmp_path, lmbda=0.25, beta=0.3, temperature=0.8, seq_kd=True, max_new_tokens=9)
    assert (trainer.lmbda, trainer.beta, trainer.temperature, trainer.seq_kd) == (0.25, 0.3, 0.8, True)
    config = trainer.generation_config
    assert (config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.do_sample) == (
        9,
        0.8,
        0,
        1.0,
        True,
    )
    assert config.pad_token_id == trainer.processing_class.pad_token_id
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert set(stops) == set(trainer.stop_ids["student"])
    assert trainer.generation_kwargs["max_new_tokens"] == 9
    with pytest.raises(TypeError):
        trainer.generation_kwargs["max_new_tokens"] = 3
    with pytest.raises(AttributeError):
        trainer.seq_kd = False


def test_a_generation_config_that_is_edited_is_followed_from_the_next_step_on(tmp_path):
    def edit(trainer):
        trainer.generation_config.max_new_tokens = 3
        trainer.generation_config.temperature = 0.5
        trainer.generation_config.top_p = 0.9
        trainer.generation_config.min_new_tokens = 3

    trainer, settings, written = trained(tmp_path, edit)
    assert [s.max_new_tokens for s in settings] == [8, 3]
    assert (settings[1].temperature, settings[1].top_p, settings[1].extra) == (0.5, 0.9, {"min_new_tokens": 3})
    assert {len(completion) for completion in written[1]} == {3}
    assert trainer.args.max_new_tokens == 3
    assert trainer.hygiene.max_new_tokens == 3


def test_a_generation_config_that_is_replaced_is_followed(tmp_path):
    def edit(trainer):
        trainer.generation_config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=5)

    trainer, settings, _ = trained(tmp_path, edit)
    assert (settings[1].max_new_tokens, settings[1].greedy, settings[1].stop_ids) == (2, True, (5,))
    assert trainer.stop_ids["student"] == (5,)
    assert trainer.hygiene.stop_ids["student"] == (5,)


def test_reading_it_changes_nothing(tmp_path):
    _, settings, written = trained(tmp_path / "a", lambda trainer: trainer.generation_config)
    _, expected, same = trained(tmp_path / "b", lambda trainer: None)
    assert settings == expected
    assert written == same


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: setattr(config, "num_beams", 4), "generation_config.num_beams=4 is nothing"),
        (lambda config: setattr(config, "use_cache", False), "generation_config.use_cache=False is nothing"),
        (lambda config: setattr(config, "max_new_tokens", 0), "max_new_tokens=0 is out of range"),
        (lambda config: setattr(config, "top_p", 1.5), "top_p=1.5 is out of range"),
    ],
)
def test_what_rollouts_cannot_follow_is_refused_by_name(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, lambda trainer: edit(trainer.generation_config))


def test_the_temperature_lmbda_and_beta_are_followed(tmp_path):
    def edit(trainer):
        trainer.temperature, trainer.lmbda, trainer.beta = 0.3, 0.5, 0.9

    trainer, settings, written = trained(tmp_path, edit, lmbda=0.75)
    assert settings[1].temperature == trainer.generation_config.temperature == 0.3
    assert [len(step) for step in written] == [3, 2]
    assert trainer.loss_settings.divergence.name == "jsd(beta=0.9)"


@pytest.mark.parametrize(
    ("values", "name", "value", "message"),
    [
        ({"lmbda": 0.0}, "lmbda", 0.5, "lmbda=0.5 cannot follow lmbda=0.0"),
        ({"lmbda": 1.0}, "lmbda", 0.5, "lmbda=0.5 cannot follow lmbda=1.0"),
        ({"lmbda": 0.5}, "lmbda", 1.5, "lmbda=1.5 cannot follow"),
        ({"divergence": "forward_kl"}, "beta", 0.1, "beta=0.1 has no effect"),
        ({}, "beta", 2.0, "beta must be between"),
        ({"lmbda": 0.0}, "temperature", 0.1, "no effect with lmbda=0"),
        ({"seq_kd": True}, "temperature", 0.1, "cannot change with seq_kd"),
    ],
)
def test_a_change_that_the_run_is_not_prepared_for_is_refused(tmp_path, values, name, value, message):
    trainer = trainer_of(tmp_path, **values)
    before = getattr(trainer, name)
    with pytest.raises(ValueError, match=message):
        setattr(trainer, name, value)
    assert getattr(trainer, name) == before


@pytest.mark.parametrize("name", ["generalized_jsd_loss", "generate_on_policy_outputs"])
def test_a_subclass_that_overrides_what_is_not_called_is_refused(name):
    with pytest.raises(ValueError, match=f"Mine.{name} has no effect"):
        type("Mine", (GKDTrainer,), {name: staticmethod(lambda *_: None)})


def test_a_length_for_rows_that_is_shorter_than_a_rollout_bounds_rows_alone(tmp_path, caplog):
    """TRL's max_length bounds prompt and answer of the data; a rollout goes beyond it."""
    trainer = trainer_of(tmp_path, lmbda=1.0, max_length=60, max_new_tokens=64)
    assert trainer.args.prompt_limit == 59
    assert "max_length=60 is no more than max_new_tokens=64" in caplog.text
    trainer.train()
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    assert 0 < longest <= 60
