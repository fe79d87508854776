"""`teachers`: several teachers of any kind. Together they are what each is alone, for its own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import change, config, logged, losses
from vllm_server.fake import FakeServer

from gkd.config.fields import GKDConfig
from gkd.training.trainer import GKDTrainer

NAMES = ("dense", "offloaded", "served")
TOP_K = 20
ON_SERVER: dict[str, Any] = {"teacher_top_k": TOP_K}


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


def entries(models: Path, server: FakeServer) -> dict[str, dict[str, Any]]:
    return {
        "dense": {"model": str(models / "dense")},
        "offloaded": {"model": str(models / "offloaded"), "placement": "cpu_offload"},
        "served": {"server": server.url, "top_k": TOP_K},
    }


def alone(name: str, models: Path, server: FakeServer) -> dict[str, Any]:
    """The fields of a run with this teacher only."""
    if name == "served":
        return {"teacher_server_url": server.url, "teacher_top_k": TOP_K}
    placement = {"teacher_placement": "cpu_offload"} if name == "offloaded" else {}
    return {"teacher_model_name_or_path": str(models / name), **placement}


def rows_of(*names: str, n: int = 12) -> list[dict[str, Any]]:
    """Rows of several teachers in turn, without those of others."""
    every = [{**row, "teacher": NAMES[i % len(NAMES)]} for i, row in enumerate(tiny_rows(n))]
    return [row for row in every if row["teacher"] in names]


def trainer_on(folder: Path, rows: list[dict[str, Any]], student: Any = None, **values: Any) -> GKDTrainer:
    extra = {name: values.pop(name) for name in ("eval_dataset", "callbacks") if name in values}
    return GKDTrainer(
        student or tiny_model(seed=1),
        args=config(folder, **{"lmbda": 0.0, "max_length": 128, **values}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        **extra,
    )


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("with_ce", [0.0, 0.3], ids=["", "cross-entropy"])
def test_a_mixed_micro_batch_is_the_single_runs_summed(with_ce, accumulation, models, server, tmp_path):
    common = {"ce_weight": with_ce, "gradient_accumulation_steps": accumulation}
    together = trainer_on(
        tmp_path / "all",
        rows_of(*NAMES),
        teachers=entries(models, server),
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
