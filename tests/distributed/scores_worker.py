"""Started by test_scores_ranks.py: forked ranks that share what a teacher was asked for, hidden states or answers."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

from datasets import Dataset  # noqa: E402
from forked import Child, ranks  # noqa: E402
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer  # noqa: E402
from training import config, losses  # noqa: E402

import gkd.commands.precompute.scores  # noqa: E402, F401 - imported before the fork
from gkd.cli import main  # noqa: E402
from gkd.teachers.local import LocalTeacher  # noqa: E402
from gkd.training.trainer import GKDTrainer  # noqa: E402

Say = Callable[[str], None]
ROWS = tiny_rows(16)


def train(folder: Path, rows: list[Any], say: Say | None, **values: Any) -> None:
    """Two epochs; says the losses, how many rows the live teacher scored, in how many calls, and if it was loaded."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    scored, original = [0], LocalTeacher.score

    def score(self: Any, batch: Any) -> Any:
        scored.append(len(batch["labels"]))
        return original(self, batch)

    LocalTeacher.score = score  # type: ignore[method-assign]
    defaults = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-2, "optim": "adamw_torch", "lmbda": 0.0}
    args = config(
        folder / "out",
        teacher_model_name_or_path=str(folder / "teacher"),
        teacher_model_init_kwargs={"attn_implementation": None, "dtype": "auto"},  # as a recipe's flags say it
        **{**defaults, "per_device_train_batch_size": 2, **values},
    )
    trainer = GKDTrainer(
        model=tiny_model(seed=1), args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )
    trainer.train()
    if say is not None:
        loaded = getattr(trainer.teacher, "loaded", True)
        say(json.dumps({"losses": losses(trainer), "scored": sum(scored), "calls": len(scored) - 1, "loaded": loaded}))


def outcome(children: list[Child]) -> list[Any]:
    codes = [child.join() for child in children]
    assert codes == [0, 0], "\n".join(child.said()[-6000:] for child in children)
    return [json.loads(line) for child in children for line in child.lines[-1:]]


def on_ranks(folder: Path, rows: list[Any], **values: Any) -> list[Any]:
    return outcome(ranks(lambda say: train(folder, rows, say, **values), folder))


def precomputed(folder: Path, store: str) -> list[Any]:
    """`gkd precompute --scores` on both ranks; says how many calls of the teacher each made."""
    save_tiny(folder / "student", seed=1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "recipe.py").write_text("from gkd.run import run\nrun()\n")
    flags = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "dataset_name": "rows.jsonl"}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(folder / value))]
    argv += ["--teacher_scores_dir", store, "--output_dir", str(folder / "out"), "--max_length", "256"]
    argv += ["--lmbda", "0", "--per_device_train_batch_size", "3"]

    def work(say: Say) -> None:
        calls, original = [0], LocalTeacher.score

        def score(self: Any, batch: Any) -> Any:
            calls[0] += 1
            return original(self, batch)

        LocalTeacher.score = score  # type: ignore[method-assign]
        assert main(["precompute", str(folder / "recipe.py"), "--scores", *argv]) == 0
        say(json.dumps(calls[0]))

    return outcome(ranks(work, folder))


@contextmanager
def split_up(folder: Path, **stage3: Any) -> Iterator[None]:
    """Inside, ranks are wired as DeepSpeed ZeRO-3, where all of them run a model together or not at all."""
    plan = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **stage3}}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    path = folder / "plan.json"
    path.write_text(json.dumps({**plan, **dict.fromkeys(sizes, "auto"), "bf16": {"enabled": "auto"}}))
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def runs(folder: Path) -> dict[str, Any]:
    """Live; filling; filled; half filled (by another run) with the student writing, too."""
    kept = str(folder / "scores")
    half = {"lmbda": 0.5, "teacher_scores_dir": str(folder / "half")}
    result = {
        "live": on_ranks(folder, ROWS),
        "filling": on_ranks(folder, ROWS, teacher_scores_dir=kept),
        "filled": on_ranks(folder, ROWS, teacher_scores_dir=kept),
        "mixed_live": on_ranks(folder, ROWS, lmbda=0.5),
    }
    one = Child(lambda _say: train(folder, ROWS[:5], None, **{**half, "lmbda": 0.0}), folder / "one.txt")
    assert one.join() == 0, one.said()[-6000:]
    result["mixed"] = on_ranks(folder, ROWS, **half)
    result["stores"] = [len(list((folder / name).iterdir())) for name in ("scores", "half")]
    return result


def under_zero3(folder: Path) -> dict[str, Any]:
    """The same with a teacher that all ranks must run together or not at all."""
    half = {"lmbda": 0.5, "teacher_scores_dir": str(folder / "half")}
    kept = {"teacher_scores_dir": str(folder / "scores")}
    saving = {"stage3_gather_16bit_weights_on_model_save": True}
    with split_up(folder, **saving):
        result: dict[str, Any] = {
            "live": on_ranks(folder, ROWS),
            "precomputed": precomputed(folder, str(folder / "scores")),
        }
        result |= {"filled": on_ranks(folder, ROWS, **kept), "mixed_live": on_ranks(folder, ROWS, lmbda=0.5)}
    one = Child(lambda _say: train(folder, ROWS[:5], None, **{**half, "lmbda": 0.0}), folder / "one.txt")
    assert one.join() == 0, one.said()[-6000:]
    with split_up(folder, **saving):
        result["mixed"] = on_ranks(folder, ROWS, **half)
    result["stores"] = [len(list((folder / name).iterdir())) for name in ("scores", "half")]
    return result


def answers(folder: Path) -> dict[str, Any]:
    """`gkd precompute`, the teacher's answers, by two ranks under ZeRO-3 and by one process."""
    save_tiny(folder / "student", seed=1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(9)))
    values = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        "max_new_tokens": 6,
        "rollout_batch_size": 4,  # 9 prompts, 8 at a time: the second rank has none in the last call
    }

    def work(name: str) -> None:
        out = {"output_dir": folder / name, "precompute_output": folder / name / "data"}
        flags = [part for key, value in {**values, **out}.items() for part in (f"--{key}", str(value))]
        assert main(["precompute", "recipes/gkd_qwen2.py", *flags]) == 0

    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    with split_up(folder):
        outcome(ranks(lambda _say: work("two"), folder))
    del os.environ["TORCH_DISTRIBUTED_DEBUG"]
    one = Child(lambda _say: work("one"), folder / "one.txt")
    assert one.join() == 0, one.said()[-6000:]
    result: dict[str, Any] = {}
    for name in ("two", "one"):
        table = folder / name / "data" / "data" / "train-00000-of-00001.parquet"
        stores = {path.parent.name: 0 for path in (folder / name).glob("_teacher_sequences/*/about.json")}
        for path in (folder / name).glob("_teacher_sequences/*/*.jsonl"):
            stores[path.parent.name] += len(path.read_text().splitlines())
        result[name] = {"table": Dataset.from_parquet(str(table)).to_list(), "stores": stores}
    return result


SCENES = {"runs": runs, "under_zero3": under_zero3, "answers": answers}

if __name__ == "__main__":
    for scene in sys.argv[2:]:
        place = Path(sys.argv[1]) / scene
        place.mkdir()
        save_tiny(place / "teacher", seed=2, hidden=48, layers=3)
        (place / "result.json").write_text(json.dumps(SCENES[scene](place), indent=1))
