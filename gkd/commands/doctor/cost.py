"""The doctor's estimate of a run: memory by the formulas of `gkd plan`, time from optimizer steps that are made.

The timed steps are the run's own (models, batch sizes, rollouts, teacher) on rows of the data, with at most as many
micro-batches as one rollout batch holds; they are made with throw-away weights. The first step warms up, the second
is timed.
"""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from gkd.commands.doctor.view import Diagnosis
from gkd.commands.plan.changes import smallest_change
from gkd.commands.plan.memory import GIB, Estimate, estimate
from gkd.commands.plan.plan import setup_of
from gkd.common.sign_of_life import SignOfLife
from gkd.common.text import rough_duration
from gkd.config.fields import GKDConfig
from gkd.config.schedules import AUTO, in_words, schedule_of
from gkd.recipe.capture import Recipe
from gkd.training.metrics import PHASES
from gkd.training.steering import AUTO_START
from gkd.training.trainer import GKDTrainer

_PARTS_NAMED = 3  # the largest parts of the memory that a line names
STEPS = 2


def examine_memory(out: Diagnosis, recipe: Recipe) -> None:
    """What each GPU (or this machine) needs at the run's peak, against what it has.

    Raises:
        ValueError: a model's config cannot be read.
    """
    args = recipe.settings.training
    card = None if args.use_cpu else capacity("cuda")
    setup = setup_of(recipe, gpus=max(1, args.world_size), zero_stage=0, offload=False, memory=card)
    found, room = estimate(setup), capacity(setup.device)
    where = "a GPU" if setup.device == "cuda" else "memory"
    text = f"about {found.peak / GIB:.1f} GiB of {room / GIB:.1f} GiB of {where} at the peak ({_largest(found)})"
    if found.peak <= room:
        out.add("Memory", "ok", f"{text}, by the formulas of gkd plan")
        return
    change = "; ".join(smallest_change(setup, room)) or "a smaller model, or shorter rows"
    out.add("Memory", "warning", f"{text}: does not fit on this machine", f"{change}; see also gkd plan")


def _largest(found: Estimate) -> str:
    parts = sorted(found.parts.items(), key=lambda part: -part[1])[:_PARTS_NAMED]
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)


def capacity(device: str) -> int:
    """Bytes of the smallest of the visible GPUs, or of this machine's memory."""
    if device == "cuda" and torch.cuda.is_available():
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------------------------------------------------------ time


@dataclass(frozen=True)
class Schedule:
    """Of the run: `steps` optimizer steps of `micro_batches` each; of which a timed step has `timed`."""

    steps: int
    micro_batches: int
    timed: int

    @property
    def scale(self) -> float:
        return self.micro_batches / self.timed


def timed_steps(args: GKDConfig, rows: int) -> tuple[GKDConfig, Schedule]:
    """A run's arguments as those of the timed steps, and the schedule of the run itself.

    Args:
        args: the run's, before a trainer is made from them; they stay as they are.
        rows: of the training set, after preparation.
    """
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    together = batch // args.num_completions * max(1, args.world_size)
    per_epoch = max(1, math.ceil(math.ceil(rows / together) / accumulation))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    # What is generated together has to be there in a timed step, too.
    rollout_batch = args.rollout_batch_size or batch * (4 if args.use_cpu else max(4, accumulation))
    timed = min(accumulation, max(1, math.ceil(rollout_batch / batch)))
    args = copy.copy(args)
    args.gradient_accumulation_steps, args.max_steps = timed, STEPS
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.load_best_model_at_end, args.eval_on_start = False, False
    args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, 1
    args.mixing = "sample"  # the same share of rollouts in every step
    args.rollout_every = 1  # and all of one: a run with larger ones is quicker than is told
    _hold_still(args, steps)
    args.resume_from_checkpoint, args.disable_tqdm = None, True
    return args, Schedule(steps, accumulation, timed)


def _hold_still(args: GKDConfig, steps: int) -> None:
    """In place of a schedule one number: of lmbda the run's mean, of max_new_tokens the most, else the last."""
    args.lmbda = _mean("lmbda", args.lmbda, steps)
    args.max_new_tokens = args.most_new_tokens
    args.temperature = schedule_of("temperature", args.temperature).values[-1]
    args.beta = schedule_of("beta", args.beta).values[-1]


def _mean(name: str, value: float | str, steps: int) -> float:
    """Over the run; of what the run decides for itself, the middle."""
    if value == AUTO:
        return 0.5
    schedule = schedule_of(name, value)
    return value if isinstance(value, float) else sum(schedule.at(step, steps) for step in range(steps)) / steps


def examine_schedules(out: Diagnosis, args: GKDConfig, steps: int) -> None:
    """What the fields that follow a schedule are at first, halfway and at last."""
    shown = []
    for name, text in in_words(args).items():
        if text == AUTO:
            shown.append(f"{name} as the run decides, from {AUTO_START} at first")
            continue
        schedule = schedule_of(name, text)
        first, half, last = (schedule.at(step, steps) for step in (0, steps // 2, steps - 1))
        mean = _mean(name, text, steps)
        shown.append(f"{name} {first:.3g} at first, {half:.3g} halfway, {last:.3g} at last, {mean:.3g} on average")
    if shown:
        out.add("Schedules", "ok", f"{'; '.join(shown)}; over {steps:,} steps")


def spread(prepared: Dataset, number: int) -> list[int]:
    """Numbers (column `row`) of rows from all over the data set."""
    number = min(number, len(prepared))
    return [prepared[i * len(prepared) // number]["row"] for i in range(number)]


@dataclass
class _Clock(TrainerCallback):
    """When optimizer steps ended."""

    ends: list[float] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def examine_time(out: Diagnosis, trainer: GKDTrainer, schedule: Schedule) -> None:
    """Make the timed steps with a trainer whose arguments `timed_steps` gave; its weights change.

    Raises:
        torch.OutOfMemoryError, FloatingPointError, ServerError: as the run would.
    """
    clock = _Clock()
    trainer.add_callback(clock)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with SignOfLife(f"making {STEPS} steps"):
        trainer.train()
    if len(clock.ends) < STEPS:
        out.add("Time", "warning", "not estimated: the timed steps did not all end", "look at the first steps' log")
        return
    step = (clock.ends[-1] - clock.ends[-2]) * schedule.scale
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry][-1]
    phases = ", ".join(
        f"{phase} {logs[f'time/{phase}'] * schedule.scale:.2g} s" for phase in PHASES if logs.get(f"time/{phase}")
    )
    rows = trainer.args.per_device_train_batch_size * schedule.timed
    how = f"one timed step of {rows} rows" + (f", times {schedule.scale:.3g}" if schedule.scale != 1 else "")
    peak = f"; {torch.cuda.max_memory_allocated() / GIB:.1f} GiB of a GPU used" if torch.cuda.is_available() else ""
    out.add(
        "Time",
        "ok",
        f"about {rough_duration(step * schedule.steps)}: {schedule.steps:,} steps of {step:.2g} s ({phases}), from "
        f"{how} on these devices; evaluation and saving come on top{peak}",
    )
