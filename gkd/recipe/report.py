"""What a run shows of itself: student before and after, in the log, the table, the files and the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from gkd.evaluation.harness import Evaluator
from gkd.evaluation.measures import Measures
from gkd.evaluation.subject import LocalSubject
from gkd.report.comparison import as_dict, samples_table, table
from gkd.report.plots import write_plots
from gkd.report.repo import Repo
from gkd.training.trainer import GKDTrainer


class LogAtStart(TrainerCallback):
    """Logs what was measured before the training once the training begins: the Trainer starts its history anew then,
    and a logger that is asked earlier opens a place of its own.

    Args:
        trainer: whose `log` is used.
        values: by log name; `eval_...` is what transformers' loggers group under `eval/`.
    """

    def __init__(self, trainer: Any, values: dict[str, float]) -> None:
        self._trainer, self._values = trainer, values

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.log(dict(self._values))
        if "trackio" in args.report_to and args.run_name is None:
            # Trackio ends its run with the training; what is logged later joins it by this name.
            import trackio

            run = trackio.context_vars.current_run.get()
            args.run_name = None if run is None else run.name


# What the console shows; everything that was measured stands in evaluation.json and on the card.
HEADLINES = (
    "divergence_own",
    "divergence_teacher_text",
    "perplexity",
    "acceptance",
    "acceptance_greedy",
    "draft_cost",
    "speedup",
    "speedup_greedy",
    "ended",
    "score_greedy",
    "score_sampled",
    "corpus_score_greedy",
    "corpus_score_sampled",
)


class Report:
    """Measures around the training.

    Args:
        trainer: the trainer, prepared.
        evaluator: None measures nothing, and the report is of the training alone.
    """

    def __init__(self, trainer: GKDTrainer, evaluator: Evaluator | None) -> None:
        self.trainer, self.evaluator = trainer, evaluator
        self.before: Measures | None = None
        self.after: Measures | None = None
        self.teacher: Measures | None = None
        self.comparison: dict[str, Any] | None = None

    def measure_before(self) -> None:
        """Measure the untrained student and the teacher. A collective: every rank calls it."""
        assert self.evaluator is not None
        self.before = self.evaluator.measure(LocalSubject(self.trainer.model_wrapped), "student before")
        of_teacher = {}
        if self.evaluator.teacher is not None:
            self.teacher = self.evaluator.measure(self.evaluator.teacher, "teacher")
            of_teacher = self.teacher.as_log("eval_teacher")
        self.trainer.add_callback(LogAtStart(self.trainer, {**self.before.as_log("eval_before"), **of_teacher}))

    def measure_after(self) -> None:
        """Measure the trained student and compare. A collective."""
        assert self.evaluator is not None
        assert self.before is not None
        self.after = self.evaluator.measure(LocalSubject(self.trainer.model_wrapped), "student after")
        self.trainer.log(self.after.as_log("eval_after"))
        self.comparison = as_dict(self.before, self.after, self.teacher)

    def finish(self, output_dir: str, seconds: float, datasets: list[str]) -> dict[str, Any]:
        """Write evaluation.json and the plots; returns what the model card should say (fields of `CardInfo`)."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.comparison is not None:
            text = json.dumps(self.comparison, indent=2, ensure_ascii=False)
            (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        plots = write_plots(self.trainer.state.log_history, folder / "plots", self.comparison)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return {
            "datasets": [Repo(name) for name in datasets],
            "evaluation": self.comparison,
            "plots": [(str(path.relative_to(folder)), caption) for path, caption in plots],
            "wall_time_s": seconds,
            "peak_memory_bytes": peak,
        }

    def show(self, console: Console) -> None:
        """Print the table and the sample completions."""
        if self.before is not None and self.after is not None:
            console.print(table(self.before, self.after, self.teacher, [*HEADLINES, *self.before.extra]))
            console.print(samples_table(self.before, self.after))
