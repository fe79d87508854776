"""Law 3: a row's source is a function of (seed, step, row), equal on all ranks, whatever is logged or evaluated.

What is sampled repeats for the same (seed, step, row). After a resume: the file of law 7. On real ranks:
tests/distributed/test_ddp.py.
"""

import copy
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from hf_rollouts import PROMPTS, rollout_of
from peft import LoraConfig
from tiny import tiny_model, tiny_rows
from training import change, dense_loss, trainer_of
from windows import batches

from gkd.data.sources import choose_sources
from gkd.rollouts.base import row_uniforms
from gkd.training import completions
from gkd.training.window import open_window


def test_no_global_random_stream_matters_or_moves():
    expected = [choose_sources(5, step, 16, 0.4) for step in range(20)]
    random.seed(99)
    torch.manual_seed(99)
    states = random.getstate(), torch.get_rng_state()
    assert [choose_sources(5, step, 16, 0.4) for step in range(20)] == expected
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_seed_and_step_matter():
    assert len({tuple(choose_sources(seed, step, 32, 0.5)) for seed in range(8) for step in range(8)}) == 64


def test_a_known_draw_stays():
    """A resumed run of an older version must make the same decisions: this pins the stream."""
    assert choose_sources(42, 3, 6, 0.5, True) == KNOWN


KNOWN = ["teacher", "student", "student", "teacher", "student", "teacher"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_numbers_the_rows_as_one_process_does(world):
    per_batch, stream = 2, list(range(16))
    dealt = [stream[i : i + per_batch] for i in range(0, len(stream), per_batch)]
    met = {}
    for rank in range(world):
        window = open_window(batches(*dealt[rank::world]), rank, world)
        assert (window.total, window.fillers) == (16, [])
        assert window.sizes == [per_batch] * (8 // world)
        met |= {index: sequence.row for index, sequence in zip(window.indices, window.sequences, strict=True)}
    assert met == dict(zip(stream, stream, strict=True))


def test_a_row_depends_on_nothing_but_its_key():
    model = tiny_model(seed=6)
    stop_ids = tuple(range(0, 200, 11))
    rows = [17, 3, 99, 0, 41, 8, 5]
    expected = rollout_of(model, stop_ids=stop_ids).generate(PROMPTS, 7, rows)
    for batch_size in (1, 2, 5):
        assert rollout_of(model, batch_size, stop_ids=stop_ids).generate(PROMPTS, 7, rows) == expected
        asked = rollout_of(model, lambda config, device, size=batch_size: size, stop_ids=stop_ids)
        assert asked.generate(PROMPTS, 7, rows) == expected
    order = [4, 1, 6, 0, 5, 3, 2]
    shuffled = rollout_of(model, stop_ids=stop_ids).generate([PROMPTS[i] for i in order], 7, [rows[i] for i in order])
    assert shuffled == [expected[i] for i in order]
    alone = rollout_of(model, stop_ids=stop_ids).generate(PROMPTS[2:3], 7, rows[2:3])
    assert alone == expected[2:3]


def test_another_row_step_seed_or_source_is_another_draw():
    model = tiny_model(seed=6)
    prompts = [[5, 6, 7]] * 3
    draws = [
        rollout_of(model).generate(prompts, 0),
        rollout_of(model).generate(prompts, 1),
        rollout_of(model).generate(prompts, 0, [10, 20, 30]),
        rollout_of(model, seed=1).generate(prompts, 0),
        rollout_of(model, source="teacher").generate(prompts, 0),
    ]
    assert len({tuple(completion) for draw in draws for completion in draw}) == 15
    assert row_uniforms(0, 1, 11, "student", 4) != row_uniforms(0, 11, 1, "student", 4)


def test_global_random_state_is_neither_read_nor_moved():
    model = tiny_model()
    states = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
        states.append(rollout_of(model).generate(PROMPTS, 0))
        assert random.getstate() == before[0]
        assert str(np.random.get_state()) == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
    assert states[0] == states[1]


def test_evaluation_is_the_token_mean_on_the_data_and_moves_no_random_stream(tmp_path, monkeypatch):
    eval_rows = Dataset.from_list(tiny_rows(5, seed=9))
    trainer = trainer_of(tmp_path, eval_dataset=eval_rows, lmbda=1.0, per_device_eval_batch_size=2)
    for rollout in trainer.rollouts.values():
        monkeypatch.setattr(rollout, "generate", lambda *a: pytest.fail("evaluation generated"))
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    metrics = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    from gkd.data.sequences import unpad

    sequences = [s for batch in trainer.get_eval_dataloader() for s in unpad(batch)]
    assert metrics["eval_loss"] == pytest.approx(
        dense_loss(trainer.model, trainer.teacher_model, sequences).item(), rel=1e-5
    )
    assert metrics["eval_student/entropy"] > 0
    assert trainer.evaluate(eval_rows)["eval_loss"] == pytest.approx(metrics["eval_loss"])


def test_evaluation_between_steps_changes_nothing(tmp_path):
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"])
    results = []
    for strategy in ("no", "steps"):
        trainer = trainer_of(
            tmp_path, max_steps=3, lmbda=0.5, eval_dataset=Dataset.from_list(tiny_rows(4, seed=9)),
            eval_strategy=strategy, eval_steps=1, peft_config=copy.deepcopy(lora),
        )  # fmt: skip
        results.append(change(trainer))
    assert torch.equal(*results)


def test_it_changes_nothing_in_the_training(tmp_path, monkeypatch):
    def weights(**values):
        monkeypatch.setattr(completions, "print_samples", lambda samples: None)
        trainer = trainer_of(tmp_path, max_steps=2, temperature=1.0, lmbda=1.0, **values)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    assert torch.equal(weights(), weights(log_completions=True, log_completions_steps=1))
