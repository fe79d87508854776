"""The command."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rich.console import Console

from gkd.commands.sweep import report
from gkd.commands.sweep.board import Board
from gkd.commands.sweep.comparison import compare
from gkd.commands.sweep.folder import claim
from gkd.commands.sweep.grid import Cell
from gkd.commands.sweep.jobs import Ended, run_all, told
from gkd.commands.sweep.outcome import Outcome, keep, kept, read_output, surroundings
from gkd.commands.sweep.plan import Order, Plan, Run, make_plan
from gkd.commands.sweep.tuning import best
from gkd.common.redact import redact_command
from gkd.training.output_folder import locked, make


class Sweep:
    """Runs what has not been run, and compares.

    Args:
        plan: checked.
        environment: of the runs: this process's, before it built configs, which set variables of their own.
        console: for progress and table.
    """

    def __init__(self, plan: Plan, environment: Mapping[str, str], console: Console) -> None:
        self.plan, self.console = plan, console
        self._environment = environment
        self._about = surroundings(plan.order.recipe)
        total = len(plan.cells) * len(plan.seeds) + sum(len(plan.tuning_runs(cell)) for cell in plan.cells)
        self._board = Board(console, total, plan.order.jobs)
        self.failed: dict[str, list[str]] = {}
        self.tuned: dict[str, str] = {}

    def run(self) -> report.Swept:
        """First what is tuned, then the cells, seed by seed, so that what there is can be compared early."""
        plan = self.plan
        with self._board.shown():
            tuning = self._finish([run for cell in plan.cells for run in plan.tuning_runs(cell)])
            chosen = {cell.index: self._choose(cell, tuning) for cell in plan.cells}
            runs = []
            for cell in plan.cells:
                values = chosen[cell.index]
                if values is None:
                    self._give_up(cell)
                else:
                    runs += plan.runs(cell, values)
            runs.sort(key=lambda run: run.seed)
            outcomes = self._finish(runs)
        names = [cell.name for cell in plan.cells]
        in_order = [outcomes[run] for run in sorted(outcomes, key=lambda run: (run.cell.index, run.seed))]
        return report.Swept(
            command=plan.order.command,
            seeds=plan.seeds,
            cells=names,
            jobs=plan.order.jobs,
            outcomes=in_order,
            tuning=list(tuning.values()),
            tuned=self.tuned,
            failed=self.failed,
            comparisons=compare(names, in_order, plan.order.at),
        )

    def _finish(self, runs: list[Run]) -> dict[Run, Outcome]:
        """The outcomes of those that were or are now finished."""
        found: dict[Run, Outcome] = {}
        for run in runs:
            before = kept(run.record)
            if before is not None and before["tuned"] == dict(run.extra):
                found[run] = before
                self._board.advance(f"already done: {run.name}")

        def on_end(ended: Ended) -> None:
            outcome = self._outcome(ended)
            if outcome is not None:
                found[ended.run] = outcome

        missing = [run for run in runs if run not in found]
        run_all(
            missing,
            self.plan.command,
            on_end,
            jobs=self.plan.order.jobs,
            environment=self._environment,
            meanwhile=self._board.look,
        )
        return found

    def _outcome(self, ended: Ended) -> Outcome | None:
        """A finished run's numbers, written down; None for one that failed, which is told."""
        run, how, words = ended.run, told(ended), ended.last_words
        numbers = None
        if ended.code == 0:
            try:
                numbers = read_output(run.output)
            except ValueError as error:
                how, words = f"failed: {run.name}", [str(error)]
        if numbers is None:
            self.failed[run.name] = [how, *words]
            self._board.advance(how, ended.wall_seconds)
            for line in words:
                self._board.say(f"    {line}")
            self._board.say(f"    all of it: {run.log}")
            return None
        outcome = {
            "cell": run.cell.name,
            "values": dict(run.cell.all_values),
            "seed": run.seed,
            "tuning": run.tuning,
            "tuned": dict(run.extra),
            "command": redact_command(self.plan.command(run)),
            "wall_seconds": round(ended.wall_seconds, 3),
            "cpu_seconds": round(ended.cpu_seconds, 3),
            **self._about,
            **numbers,
        }
        keep(run.record, outcome)
        self._board.advance(how, ended.wall_seconds)
        return outcome

    def _choose(self, cell: Cell, tuning: Mapping[Run, Outcome]) -> tuple[tuple[str, str], ...] | None:
        """The tuned values of a cell: () when nothing is tuned, None when nothing could be chosen."""
        candidates = self.plan.tuning_runs(cell)
        if not candidates:
            return ()
        runs = [run for run in candidates if run in tuning]
        found = best([tuning[run] for run in runs])
        if found is None:
            return None
        outcome, measure = found
        chosen = next(run.extra for run in runs if tuning[run] is outcome)
        shown = ", ".join(f"{field}={value}" for field, value in chosen)
        self.tuned[cell.name] = f"{shown}, of {len(runs)} tried, by {measure}"
        return chosen

    def _give_up(self, cell: Cell) -> None:
        for seed in self.plan.seeds:
            name = f"{cell.name}, seed {seed}"
            self.failed[name] = ["not run: no run of its tuning gave a measure to choose by"]
            self._board.advance(f"not run: {name}, for want of a tuned value")


def sweep(order: Order, console: Console) -> int:
    """Run a sweep, or what is left of it; 0 when every run was finished, 1 when one failed.

    Raises:
        ValueError: a user's mistake, before the first run starts.
    """
    environment = dict(os.environ)
    plan = make_plan(order)
    make(str(order.folder))
    with locked(str(order.folder)):
        plan.folders = claim(order, plan.cells)
        swept = Sweep(plan, environment, console).run()
        report.write(order.folder, swept)
    console.print(report.table(swept))
    late = dict.fromkeys(cell for one in swept.comparisons for cell in one.late)
    if late:
        console.print(report.LATE.format("; ".join(late)), markup=False, soft_wrap=True)
    if swept.failed:
        console.print(f"{len(swept.failed)} runs failed; the same command tries them again", markup=False)
    console.print(f"written to {order.folder}: {', '.join(report.FILES)}", markup=False, soft_wrap=True)
    return 1 if swept.failed else 0
