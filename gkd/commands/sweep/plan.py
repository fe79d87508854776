"""What will run: every cell's config built before the first starts."""

from __future__ import annotations

import hashlib
import logging
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gkd.commands.sweep.budget import AXES
from gkd.commands.sweep.grid import OWN_FIELDS, Arm, Axis, Cell, cells_of, flags_of
from gkd.commands.sweep.tuning import tuning_seed
from gkd.common.redact import redact_command, redact_words
from gkd.recipe.capture import capture
from gkd.recipe.set_aside import flag_values
from gkd.recipe.settings import Settings


@dataclass(frozen=True)
class Order:
    """What the user asked for."""

    recipe: Path
    flags: list[str]  # the recipe's, the same for every run
    axes: list[Axis]
    tune: list[Axis]
    seeds: int
    at: tuple[str, ...]
    jobs: int
    launch: str | None
    folder: Path
    arms: list[Arm] = field(default_factory=list)
    first_seed: int | None = None  # the recipe's own

    def __post_init__(self) -> None:
        if not self.axes and not self.arms:
            raise ValueError('name what to compare: for example --grid "lmbda=0,0.5,1"')
        for name, value in (("--seeds", self.seeds), ("--jobs", self.jobs)):
            if value < 1:
                raise ValueError(f"{name} {value} should be 1 or more")
        if self.first_seed is not None and not 0 <= self.first_seed < 2**32 - self.seeds:
            raise ValueError(f"--first_seed {self.first_seed} should be 0 or more, and below {2**32 - self.seeds}")
        for name in self.at:
            if name not in AXES:
                raise ValueError(f"--at {name!r} should be {' or '.join(AXES)}, or both with a comma between")
        swept = {name: f"the arm {arm.name!r}" for arm in self.arms for name, _ in arm.values}
        for axis in self.axes:
            if axis.field in swept:
                raise ValueError(f"--grid: {axis.field} is in {swept[axis.field]}, too: leave one of them out")
        swept |= {axis.field: "the grid" for axis in self.axes}
        for axis in self.tune:
            if axis.field in swept:
                raise ValueError(f"--tune: {axis.field} is in {swept[axis.field]}, too: leave one of them out")
        for name in flag_values(self.flags):
            if name in OWN_FIELDS:
                raise ValueError(f"--{name} is set by the sweep ({OWN_FIELDS[name]}): leave it out")
            where = swept | {axis.field: "--tune" for axis in self.tune}
            if name in where:
                raise ValueError(f"--{name} is in {where[name]} and among the flags: leave one of them out")

    @property
    def command(self) -> str:
        """The command that does the same again."""
        words = ["gkd", "sweep", str(self.recipe)]
        for arm in self.arms:
            values = " ".join(f"{name}={shlex.quote(value)}" for name, value in arm.values)
            words += ["--arm", f"{arm.name}: {values}"]
        for option, axes in (("--grid", self.axes), ("--tune", self.tune)):
            words += [word for axis in axes for word in (option, f"{axis.field}={','.join(axis.values)}")]
        words += ["--first_seed", str(self.first_seed)] if self.first_seed is not None else []
        words += ["--seeds", str(self.seeds), "--at", ",".join(self.at), "--jobs", str(self.jobs)]
        words += ["--launch", self.launch] if self.launch is not None else []
        return redact_command([*words, "--output_dir", str(self.folder), *self.flags])

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers of a folder have in common. More values, arms and seeds may be added later."""
        return {
            "recipe": str(self.recipe),
            "recipe's content": hashlib.sha256(self.recipe.read_bytes()).hexdigest(),
            "flags": redact_words(self.flags),
            "grid": {axis.field: list(axis.values) for axis in self.axes},
            **({"arms": {arm.name: dict(arm.values) for arm in self.arms}} if self.arms else {}),
            "tune": {axis.field: list(axis.values) for axis in self.tune},
            "launch": self.launch,
            "way to compare": "seconds" in self.at,
        }


@dataclass(frozen=True)
class Run:
    """One process: a cell with a seed, perhaps with values that are tuned."""

    cell: Cell
    seed: int
    folder: Path
    extra: tuple[tuple[str, str], ...] = ()
    tuning: bool = False

    @property
    def name(self) -> str:
        also = ", ".join(f"{field}={value}" for field, value in self.extra)
        return f"{self.cell.name}, seed {self.seed}" + (f" ({'tuning ' if self.tuning else ''}{also})" if also else "")

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def record(self) -> Path:
        return self.folder / "run.json"


@dataclass
class Plan:
    """The cells and seeds, each cell's config having been built once. `folders`: by a cell's name."""

    order: Order
    cells: list[Cell]
    seeds: list[int]
    tuning_seed: int
    shares_text: set[int] = field(default_factory=set)  # cells whose teacher's sequences all runs share
    folders: dict[str, str] = field(default_factory=dict)

    def command(self, run: Run) -> list[str]:
        """As a user would start the run."""
        words = launch_words(self.order.launch)
        words += [str(self.order.recipe), *self.order.flags, *flags_of(run.cell.all_values), *flags_of(run.extra)]
        words += ["--seed", str(run.seed), "--output_dir", str(run.output)]
        if run.cell.index in self.shares_text:
            words += ["--teacher_cache_dir", str(self.order.folder / "teacher_sequences")]
        return words

    def tuning_runs(self, cell: Cell) -> list[Run]:
        """One for each combination of the values to tune; none without --tune."""
        if not self.order.tune:
            return []
        place = self.order.folder / self.folders[cell.name] / "tuning"
        return [Run(cell, self.tuning_seed, place / one.folder, one.values, True) for one in cells_of(self.order.tune)]

    def runs(self, cell: Cell, tuned: tuple[tuple[str, str], ...]) -> list[Run]:
        """One for each seed."""
        place = self.order.folder / self.folders[cell.name]
        return [Run(cell, seed, place / f"seed_{seed}", tuned) for seed in self.seeds]


def launch_words(launch: str | None) -> list[str]:
    """What stands in front of the recipe.

    Raises:
        ValueError: there is no such program.
    """
    if launch is None:
        return [sys.executable]
    program, *rest = shlex.split(launch) or [""]
    beside = Path(sys.executable).with_name(program) if program else None  # of the same environment
    found = str(beside) if beside is not None and beside.is_file() else shutil.which(program)
    if found is None:
        raise ValueError(
            f'--launch {launch!r}: there is no program {program!r}; for example --launch "accelerate launch"'
        )
    return [found, *rest]


def make_plan(order: Order) -> Plan:
    """Build the config of every cell, with every value to tune.

    Raises:
        ValueError: a config that is refused, said with its cell; or nothing would be measured.
    """
    launch_words(order.launch)
    cells = cells_of(order.axes, order.arms)
    first: Settings | None = None
    shares = set()
    for cell in cells:
        for values in [one.values for one in cells_of(order.tune)]:
            settings = _settings(order, cell, values)
            _check_measured(order, settings, cell)
            first = first or settings
            training = settings.training
            if training.teacher_writes and not training.teacher_follows and training.teacher_cache_dir is None:
                shares.add(cell.index)
    assert first is not None
    if "seconds" in order.at:  # then every run pays for its own
        shares = set()
    own = first.training.seed
    begin = own if order.first_seed is None else order.first_seed
    seeds = [begin + i for i in range(order.seeds)]
    if order.tune and tuning_seed(own) in seeds:
        raise ValueError(
            f"--first_seed {begin}: with --tune seed {tuning_seed(own)} is the one that values are tried on: begin "
            f"with {own}, or above"
        )
    return Plan(order, cells, seeds, tuning_seed(own), shares)


def _settings(order: Order, cell: Cell, tuned: Sequence[tuple[str, str]]) -> Settings:
    told = logging.root.manager.disable
    logging.disable(logging.INFO)  # what a recipe sets aside stands in each run's own log
    try:
        return capture(order.recipe, [*order.flags, *flags_of(cell.all_values), *flags_of(tuned)]).settings
    except ValueError as error:
        if not order.recipe.is_file():
            raise
        name = ", ".join([cell.name, *(f"{field}={value}" for field, value in tuned)])
        raise ValueError(f"{name}: {error}") from error
    finally:
        logging.disable(told)


def _check_measured(order: Order, settings: Settings, cell: Cell) -> None:
    along, around = settings.training.evaluates_along, settings.run.evaluate_before_and_after
    if "seconds" in order.at and not along:
        raise ValueError(
            f"{cell.name}: --at seconds needs evaluations along the run: add --eval_strategy steps "
            "--eval_steps 10 --eval_on_start true"
        )
    if not along and not around:
        raise ValueError(f"{cell.name}: nothing is measured: set evaluate_before_and_after=true, or an eval_strategy")
    if order.tune and not around:
        raise ValueError(
            f"{cell.name}: --tune decides by what is measured after training: set evaluate_before_and_after=true"
        )
    if settings.training.push_to_hub:
        raise ValueError(f"{cell.name}: the runs of a sweep are not pushed: add --push_to_hub false")
