"""`teachers`: several teachers of any kind. Together they are what each is alone, for its own rows."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import several_worker
import torch
from several_worker import NAMES, RESUMED, TOP_K, entries, rows_of, trainer_on
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import change, config, logged, losses
from vllm_server.fake import FakeServer

from gkd.assembly.evaluator import Questions, make_evaluator
from gkd.config.fields import GKDConfig
from gkd.data.sequences import sequence_of
from gkd.evaluation.harness import Evaluator
from gkd.evaluation.measures import Measures
from gkd.evaluation.subject import LocalSubject
from gkd.models.placement import offload
from gkd.report.plots import plot_teachers
from gkd.training.belongs import facts_of
from gkd.training.trainer import GKDTrainer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense teacher, one with a larger head of another width, and the one that is served."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "dense", hidden=48, layers=3, seed=2)
    save_tiny(folder / "offloaded", hidden=40, vocab=272, seed=3)
    return folder


@pytest.fixture
def server():
    with FakeServer(tiny_model(seed=4), tiny_tokenizer()) as server:
        yield server


def alone(name: str, models: Path, server: FakeServer) -> dict[str, Any]:
    """The fields of a run with this teacher only."""
    if name == "served":
        return {"teacher_server_url": server.url, "teacher_top_k": TOP_K}
    placement = {"teacher_placement": "cpu_offload"} if name == "offloaded" else {}
    return {"teacher_model_name_or_path": str(models / name), **placement}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("with_ce", [0.0, 0.3], ids=["", "cross-entropy"])
def test_a_mixed_micro_batch_is_the_single_runs_summed(with_ce, accumulation, models, server, tmp_path):
    common = {"ce_weight": with_ce, "gradient_accumulation_steps": accumulation}
    together = trainer_on(
        tmp_path / "all",
        rows_of(*NAMES),
        teachers={name: {**entry, "weight": None} for name, entry in entries(models, server.url).items()},
        per_device_train_batch_size=12 // accumulation,
        **common,
    )
    found = change(together)
    total, value, number = torch.zeros_like(found), 0.0, 0
    for name in NAMES:
        rows = rows_of(name)
        single = trainer_on(
            tmp_path / name,
            rows,
            per_device_train_batch_size=len(rows),
            **{**common, "gradient_accumulation_steps": 1},
            **alone(name, models, server),
        )
        targets = sum(label != -100 for row in single.train_dataset["labels"] for label in row[1:])
        total += targets * change(single).double()
        value += targets * losses(single)[0]
        number += targets
        assert logged(together, f"teacher/{name}/divergence") == pytest.approx(logged(single, "loss/data"), rel=1e-5)
    assert losses(together) == pytest.approx([value / number], rel=1e-6)
    torch.testing.assert_close(found, (total / number).float(), rtol=1e-6, atol=1e-6)


def test_an_unknown_teacher_is_an_error_before_the_first_step(models, tmp_path):
    two = {name: {"model": str(models / name)} for name in ("dense", "offloaded")}
    with pytest.raises(ValueError, match=r"row 2, column 'teacher': is 'served', .* dense, offloaded"):
        trainer_on(tmp_path, rows_of(*NAMES), teachers=two)
    with pytest.raises(ValueError, match=r"row 0, column 'teacher': is missing: .* dense, offloaded"):
        trainer_on(tmp_path, tiny_rows(4), teachers=two)


SERVED = {"server": "http://localhost:1", "top_k": 8}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teachers": {}}, "should be a dict"),
        ({"teachers": {"a b": None}}, "'a b' is no name"),
        ({"teachers": {"a": "x"}}, r"teachers\['a'\]='x' should be a dict"),
        ({"teachers": {"a": {"modle": "x"}}}, r"teachers\['a'\]: 'modle' is unknown: an entry has model, adapter"),
        ({"teachers": {"a": {"model": ""}}}, r"teachers\['a'\]: model='' should be a text"),
        ({"teachers": {"a": {"model": "x", "weight": 0}}}, r"weight=0 is out of range"),
        ({"teachers": {"a": {"model": "x", "top_k": 0}}}, r"top_k=0 is out of range"),
        ({"teachers": {"a": {"model": "x", "quantization": 5}}}, "quantization=5 is unknown: use 4, 8"),
        ({"teachers": {"a": {"model": "x", "placement": "gpu"}}}, r"teachers\['a'\]: placement='gpu' is unknown"),
        ({"teachers": {"a": {"adapter": "x", "placement": "same"}}}, "placement='same' has no effect without model"),
        ({"teachers": {"a": {"server": "http://localhost:1"}}}, r"teachers\['a'\]: server needs top_k"),
        ({"teachers": {"a": {**SERVED, "quantization": 4}}}, "quantization=4 does not go with server"),
        ({"teachers": {"a": SERVED}, "loss_temperature": 2.0}, r"teachers\['a'\]: loss_temperature=2.0 .* server"),
        ({"teachers": {"a": SERVED}, "teacher_scores_dir": "s"}, "teacher_scores_dir='s' has no effect"),
        ({"teachers": {"a": SERVED}, "share_base_model": True}, "share_base_model=True has no effect"),
        ({"teachers": {"a": {"model": "x"}}, "teacher_model_name_or_path": "y"}, "'y' has no effect, since all of"),
        ({"teachers": {"a": {"model": "x"}}, "teacher_adapters": {"b": None}}, "teacher_adapters=.* does not go with"),
        ({"teachers": {"a": {"model": "x"}}, "teacher_server_url": "http://x:1", "teacher_top_k": 8}, "with teachers"),
        ({"teachers": {"a": None, "b": None}, "teacher_placement": "cpu_offload"}, "where the student's or the other"),
        (
            {"teachers": {"a": {"model": "x", "weight": 2}}, "lmbda": 0.0, "seq_kd": True, "seq_kd_loss": "nll"},
            "weight=2.0 has no effect with seq_kd_loss='nll'",
        ),
    ],
)
def test_entries_that_are_none_and_fields_that_do_not_go_together(values, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        GKDConfig(str(tmp_path), **values)


def test_by_flag_and_what_each_entry_says(tmp_path):
    text = (
        '{"math": {"model": "org/math", "quantization": 4, "weight": 2}, "code": {"server": "http://x:1", "top_k": 8}}'
    )
    args = GKDConfig(str(tmp_path), teachers=text, rollout_server_timeout=30, top_k_tail="renormalize_both")
    assert args.teacher_names == ("math", "code")
    assert args.teacher_weights == (2.0, 1.0)
    math, code = args.each_teacher.values()
    assert (math.teacher_model_name_or_path, math.teacher_model_init_kwargs) == ("org/math", {"load_in_4bit": True})
    assert (code.teacher_server_url, code.teacher_top_k, code.teacher_model_name_or_path) == ("http://x:1", 8, None)
    assert args.teachers == {  # the user's stays as it is
        "math": {"model": "org/math", "quantization": 4, "weight": 2},
        "code": {"server": "http://x:1", "top_k": 8},
    }


def test_a_model_that_nobody_stands_on_and_a_base_that_nobody_names(models, tmp_path):
    own = {"teachers": {"dense": {"model": str(models / "dense")}}}
    with pytest.raises(ValueError, match="teacher_model does not go with"):
        GKDTrainer(tiny_model(), tiny_model(), config(tmp_path, **own), processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"teachers\['dense'\]: there is no teacher"):
        trainer_on(tmp_path, rows_of("dense"), teachers={"dense": {}})


class Accelerator:
    """Stands in for one: copies of weights that were brought there, as long as anybody holds them."""

    def __init__(self) -> None:
        self.copies: list[tuple[weakref.ref[Any], int]] = []
        self.peak = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self.copies.append((weakref.ref(copy.untyped_storage()), copy.untyped_storage().nbytes()))
        self.peak = max(self.peak, self.resident)
        return copy

    @property
    def resident(self) -> int:
        return sum(size for copy, size in self.copies if copy() is not None)


@pytest.mark.parametrize("accumulation", [1, 3], ids=["a micro-batch", "a window"])
def test_offloaded_teachers_take_turns(accumulation, models, tmp_path, monkeypatch):
    """Scoring a micro-batch or a whole window, writing, and in the loss: one teacher's weights at a time."""
    common = {
        "per_device_train_batch_size": 12 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "lmbda": 0.5,
        "seq_kd": True,
        "temperature": 0.0,
        "teacher_cache_dir": "off",
    }
    names = ("dense", "offloaded")
    standing = {name: {"model": str(models / name)} for name in names}
    expected = trainer_on(tmp_path / "a", rows_of(*names, n=18), teachers=standing, **common)
    accelerator = Accelerator()
    monkeypatch.setattr(
        "gkd.models.placement.offload",
        lambda model, device, real=offload, **how: real(model, torch.device("cpu"), accelerator, **how),
    )
    moved = {name: {**entry, "placement": "cpu_offload"} for name, entry in standing.items()}
    trainer = trainer_on(tmp_path / "b", rows_of(*names, n=18), teachers=moved, **common)
    assert accelerator.resident == 0, "something of a teacher stands there while it does nothing"
    torch.testing.assert_close(change(trainer), change(expected), rtol=0, atol=0)
    assert losses(trainer) == losses(expected)
    assert accelerator.resident == 0

    def size(model: Any) -> int:
        return sum(parameter.numel() * 4 for parameter in model.parameters())

    sizes = [size(teacher.model) for teacher in trainer.teacher.each()]
    student = size(trainer.model)
    assert sum(sizes) > 1.3 * max(sizes)
    assert max(sizes) <= accelerator.peak
    assert student + accelerator.peak <= 1.05 * (student + max(sizes))


def test_a_run_of_several_kinds_goes_on_bit_for_bit_after_kill_9(models, server, tmp_path):
    """Scores, sequences and weights: of a process that is gone in the middle of a step, and one that never stopped."""
    values = {"teachers": entries(models, server.url), **RESUMED}
    whole = trainer_on(tmp_path / "whole", rows_of(*NAMES), **values)
    whole.train()
    worker = Path(several_worker.__file__)
    paths = [str(worker.parent), str(worker.parents[2]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(worker), str(tmp_path / "parts"), str(models), server.url]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    resumed = trainer_on(tmp_path / "parts", rows_of(*NAMES), **values)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert {source: n for source, n in resumed.ledger.sequences.items() if n} == {"student": 18, "teacher": 18}
    for (name, found), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_every_prompt_is_measured_against_its_own_teacher(models, server, tmp_path):
    """The numbers of the evaluations that each teacher has for its own prompts, weighted by tokens."""
    every = entries(models, server.url)
    greedy = {"temperature": 0.0, "eval_strategy": "no"}
    trainer = trainer_on(tmp_path / "all", rows_of(*NAMES), teachers=every, **greedy)

    def measured(trainer: GKDTrainer) -> tuple[Evaluator, Measures, Measures]:
        rows = [sequence_of(row) for row in trainer.train_dataset]
        questions = Questions(
            [row.prompt for row in rows],
            [row.input_ids for row in rows],
            [row.prompt_length for row in rows],
            teachers=tuple(row.teacher for row in rows),
            held_out_teachers=tuple(row.teacher for row in rows),
        )
        evaluator = make_evaluator(trainer, questions)
        student = evaluator.measure(LocalSubject(trainer.model), "student")
        return evaluator, student, evaluator.measure(evaluator.teacher, "teacher")

    evaluator, student, teacher = measured(trainer)
    assert "each row with its own teacher (dense, offloaded, served)" in evaluator.settings()["divergence"]
    assert teacher.values["divergence_own"].value == pytest.approx(0, abs=1e-6)
    texts, logs, counts = [], 0.0, 0
    for number, name in enumerate(NAMES):
        one, own, of_teacher = measured(
            trainer_on(tmp_path / name, rows_of(name), **alone(name, models, server), **greedy)
        )
        mine = [i for i, other in enumerate(evaluator.teachers) if other == number]
        assert [evaluator.teacher_text()[i] for i in mine] == one.teacher_text()
        value = own.values["divergence_own"].value
        assert student.values[f"divergence_own_{name}"].value == pytest.approx(value, rel=1e-6)
        assert student.extra[f"divergence_own_{name}"].label == f"Divergence, own completions, {name}"
        texts.append((own.values["divergence_teacher_text"].value, sum(map(len, one.teacher_text()))))
        held = sum(len(ids) - start for ids, start in zip(one.held_out, one.held_out_starts, strict=True))
        logs, counts = logs + held * math.log(of_teacher.values["perplexity"].value), counts + held
    total = sum(value * number for value, number in texts) / sum(number for _, number in texts)
    assert student.values["divergence_teacher_text"].value == pytest.approx(total, rel=1e-6)
    assert teacher.values["perplexity"].value == pytest.approx(math.exp(logs / counts), rel=1e-6)


def test_card_facts_and_pictures_name_every_teacher(models, server, tmp_path):
    trainer = trainer_on(tmp_path / "run", rows_of(*NAMES), teachers=entries(models, server.url), max_steps=2)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "its row's own teacher (dense, offloaded, served)" in card
    assert "dense (`dense`), offloaded (`offloaded`, weight 2), served (`tiny/base`, on a server, its 20" in card
    assert str(models) not in card
    assert server.url not in card
    facts = facts_of(trainer)
    assert {"teacher 'dense'", "teacher 'offloaded'", "teacher 'served'"} <= set(facts)
    assert facts["teachers"]["served"] == {"server": "somewhere", "top_k": TOP_K}
    figure = plot_teachers(trainer.state.log_history)
    assert [line.get_label() for line in figure.axes[0].lines] == sorted(NAMES)
    assert plot_teachers([{"step": 1, "loss": 1.0, "teacher/entropy": 2.0}]) is None
