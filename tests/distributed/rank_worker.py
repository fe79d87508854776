"""Started by test_rank_faults.py: two forked ranks, and something that happens to one of them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

from datasets import Dataset  # noqa: E402
from forked import Child, ranks  # noqa: E402
from tiny import tiny_rows  # noqa: E402
from training import trainer_of  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import gkd.training.stream  # noqa: E402 - imported before the fork
from gkd.models.zero import gathered, zero_stage  # noqa: E402
from gkd.training.checkpoint_faults import read_state  # noqa: E402
from gkd.training.checkpoint_files import find  # noqa: E402

VALUES: dict[str, Any] = {
    "max_steps": 6,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "lmbda": 0.5,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 100,
}
Say = Callable[[str], None]


class AtStep(TrainerCallback):
    """Does something on one rank in the middle of a step (from 1)."""

    def __init__(self, step: int, rank: int, act: Callable[[], object]) -> None:
        self.step, self.rank, self.act = step, rank, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and args.process_index == self.rank:
            self.act()


def build(folder: Path, *callbacks: TrainerCallback, number: int = 24, backwards: bool = False, **values: Any) -> Any:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    rows = Dataset.from_list(tiny_rows(number)[:: -1 if backwards else 1])
    trainer = trainer_of(folder, rows, callbacks=list(callbacks), **{**VALUES, **values})
    assert trainer.accelerator.num_processes == 2
    return trainer


def report(trainer: Any, say: Say) -> None:
    """The weights' sum in full, the ledger, the count: to be compared between ranks."""
    with gathered(trainer.model.parameters()):
        trained = torch.cat([p.detach().double().flatten() for p in trainer.model.parameters()])
    result = {
        "weights": [float(trained.sum()), float(trained.abs().sum())],
        "finite": bool(torch.isfinite(trained).all()),
        "ledger": trainer.ledger.as_dict(),
        "nonfinite": trainer.record.nonfinite_steps,
        "empty": trainer.record.empty_steps,
        "step": trainer.state.global_step,
        "learning_rates": [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry],
    }
    say(json.dumps(result))


def outcome(children: list[Child]) -> list[dict[str, Any]]:
    codes = [child.join() for child in children]
    return [{"code": code, "lines": c.lines, "said": c.said()} for code, c in zip(codes, children, strict=True)]


# ------------------------------------------------------------------------------------------------ scenes


def one_rank_is_told_to_stop(folder: Path) -> list[Any]:
    def work(say: Say) -> None:
        build(folder / "run", AtStep(3, 1, lambda: signal.raise_signal(signal.SIGTERM))).train()

    def again(say: Say) -> None:
        trainer = build(folder / "run")
        trainer.train(resume_from_checkpoint=True)
        report(trainer, say)

    def never(say: Say) -> None:
        trainer = build(folder / "never")
        trainer.train()
        report(trainer, say)

    stopped = outcome(ranks(work, folder))
    checkpoint = find(folder / "run")
    assert checkpoint is not None
    state = read_state(checkpoint)
    assert state is not None
    saved = [checkpoint, sorted(state["files"])]
    return [stopped, saved, outcome(ranks(again, folder)), outcome(ranks(never, folder))]


def _spoil(trainer: Any, step: int) -> None:
    """On rank 1 the loss of this step (from 0) is NaN."""
    original = type(trainer.micro_batches).divergence

    def divergence(*args: Any, **options: Any) -> Any:
        output = original(trainer.micro_batches, *args, **options)
        if trainer.state.global_step == step and trainer.args.process_index == 1:
            import dataclasses

            output = dataclasses.replace(output, loss=output.loss + float("inf"))
        return output

    trainer.micro_batches.divergence = divergence


def one_rank_has_no_finite_loss(folder: Path, stage: int = 0, **values: Any) -> list[Any]:
    def work(say: Say) -> None:
        trainer = build(folder / "run", max_steps=4, **values)
        assert zero_stage(trainer.accelerator) == stage
        _spoil(trainer, 1)
        trainer.train()
        report(trainer, say)

    return outcome(ranks(work, folder))


@contextmanager
def zero(folder: Path, stage: int) -> Iterator[None]:
    """Inside, trainers are wired as DeepSpeed ZeRO."""
    saving = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    plan = {"zero_optimization": {"stage": stage, **saving}, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    path = folder / "plan.json"
    path.write_text(json.dumps({**plan, **dict.fromkeys(sizes, "auto")}))
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(path))
    try:
        yield
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"], os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]


def under_zero(folder: Path, stage: int, bf16: bool) -> list[Any]:
    with zero(folder, stage):
        return one_rank_has_no_finite_loss(folder, stage, bf16=bf16)


class Program:
    """A pickle that runs a program when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def a_foreign_checkpoint(folder: Path, stage: int) -> list[Any]:
    """A real checkpoint is gone on from, with another learning rate; then one of its states is a program."""

    def work(say: Say) -> None:
        build(folder / "run", max_steps=4, save_steps=2).train()

    def again(say: Say) -> None:
        trainer = build(folder / "run", max_steps=4, save_steps=1, learning_rate=1e-3)
        assert zero_stage(trainer.accelerator) == stage
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
        report(trainer, say)

    with zero(folder, stage):
        result = [outcome(ranks(work, folder)), outcome(ranks(again, folder))]
        checkpoint = folder / "run" / "checkpoint-4"
        (checkpoint / "gkd_state.json").unlink()  # as somebody else's has none that fits
        for path in sorted(checkpoint.glob("global_step*/*rank_1_*optim_states.pt")):
            torch.save({"optimizer_state_dict": Program(folder / "it-ran")}, path)
            result.append(path.name)

        def foreign(say: Say) -> None:
            build(folder / "run", max_steps=5).train(resume_from_checkpoint=str(checkpoint))

        result.append(outcome(ranks(foreign, folder)))
    return [*result, (folder / "it-ran").exists()]


def one_rank_is_started_otherwise(folder: Path) -> list[Any]:
    """One after the other in the same two processes: each difference must end all ranks before the first step."""

    def work(say: Say) -> None:
        second = os.environ["RANK"] == "1"
        for name, (usual, other) in DIFFERENCES.items():
            try:
                build(folder / name, **(other if second else usual)).train()
                say(f"{name}: nothing")
            except ValueError as error:
                say(f"{name}: {error}")
        try:
            build(folder / ("b" if second else "a")).train()
        except ValueError as error:
            say(f"folders: {error}")

    return outcome(ranks(work, folder))


DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lmbda": ({}, {"lmbda": 0.25}),
    "seed": ({}, {"seed": 6}),
    "max_steps": ({}, {"max_steps": 4}),
    "save_steps": ({}, {"save_steps": 3}),
    "learning_rate": ({}, {"learning_rate": 1e-3}),
    "rows": ({}, {"number": 20}),
    "order": ({}, {"backwards": True}),
    "nothing": ({"max_steps": 1}, {"max_steps": 1}),
}


def nothing_to_train_on(folder: Path, stage: int = 0) -> list[Any]:
    """In the second step no rank has a target, in the third only the first has."""

    def work(say: Say) -> None:
        original, second = gkd.training.stream.write_completions, os.environ["RANK"] == "1"

        def write(window: Any, sources: Any, rollouts: Any, step: int, hygiene: Any) -> Any:
            written = original(window, sources, rollouts, step, hygiene)
            for sequence in written if step == 1 or (step == 2 and second) else ():
                sequence.labels[:] = [-100] * len(sequence.labels)
            return written

        gkd.training.stream.write_completions = write  # type: ignore[attr-defined]
        trainer = build(folder / "run", max_steps=4, weight_decay=0.1)
        assert zero_stage(trainer.accelerator) == stage
        trainer.train()
        report(trainer, say)

    return outcome(ranks(work, folder))


def nothing_under_zero(folder: Path, stage: int) -> list[Any]:
    with zero(folder, stage):
        return nothing_to_train_on(folder, stage)


def one_rank_dies(folder: Path) -> list[Any]:
    def work(say: Say) -> None:
        build(folder / "run", AtStep(3, 1, lambda: os._exit(7)), save_steps=1).train()

    start = time.monotonic()
    result: list[Any] = outcome(ranks(work, folder))
    return [*result, {"seconds": time.monotonic() - start, "newest": find(folder / "run")}]


SCENES: dict[str, Callable[[Path], list[Any]]] = {
    "one_rank_is_told_to_stop": one_rank_is_told_to_stop,
    "skip_ddp": one_rank_has_no_finite_loss,
    "skip_ddp_bf16": lambda folder: one_rank_has_no_finite_loss(folder, bf16=True),
    "skip_zero2": lambda folder: under_zero(folder, 2, bf16=False),
    "skip_zero3": lambda folder: under_zero(folder, 3, bf16=False),
    "skip_zero2_bf16": lambda folder: under_zero(folder, 2, bf16=True),
    "skip_zero3_bf16": lambda folder: under_zero(folder, 3, bf16=True),
    "one_rank_dies": one_rank_dies,
    "nothing_ddp": nothing_to_train_on,
    "nothing_zero2": lambda folder: nothing_under_zero(folder, 2),
    "nothing_zero3": lambda folder: nothing_under_zero(folder, 3),
    "one_rank_is_started_otherwise": one_rank_is_started_otherwise,
    "foreign_zero1": lambda folder: a_foreign_checkpoint(folder, 1),
    "foreign_zero2": lambda folder: a_foreign_checkpoint(folder, 2),
    "foreign_zero3": lambda folder: a_foreign_checkpoint(folder, 3),
}

if __name__ == "__main__":
    for name in sys.argv[2:] or SCENES:
        place = Path(sys.argv[1]) / name
        place.mkdir()
        (place / "result.json").write_text(json.dumps(SCENES[name](place), indent=1))
