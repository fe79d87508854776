"""The report of a run: student before and after and the teacher in one harness; table, JSON, plots, card facts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from gkd.batch import prompt_of
from gkd.card import Repo
from gkd.comparison import as_dict, samples_table, table
from gkd.config import GKDConfig
from gkd.data import prepare_dataset
from gkd.evaluate import Evaluator
from gkd.evaluate_teacher import teacher_of
from gkd.measures import Measures
from gkd.plots import write_plots
from gkd.public_tasks import PublicTasks
from gkd.recipe import Recipe
from gkd.task_score import TaskScore
from gkd.trainer import GKDTrainer
from gkd.trainer_logging import LogAtStart

logger = logging.getLogger(__name__)

# What the console shows; everything that was measured stands in evaluation.json and on the card.
HEADLINES = (
    "divergence_own",
    "divergence_teacher_text",
    "perplexity",
    "ended",
    "score_greedy",
    "score_sampled",
    "corpus_score_greedy",
    "corpus_score_sampled",
)

HELD_OUT_ROWS = 256  # answers of the eval rows that the perplexity is measured on, when no texts are given


def evaluator_of(trainer: GKDTrainer, data: dict[str, Any], recipe: Recipe) -> Evaluator:
    """The harness of a recipe, on prompts that are fixed before the training.

    Args:
        trainer: the trainer, prepared.
        data: what the recipe's `load_data` gave: `prompts` (rows to measure on; the first rows of `eval`, else of
            `train`, when it is missing) and `held_out_text` (texts; the answers of `eval` when it is missing).
        recipe: its scores, and how much is measured.

    Raises:
        ValueError: rows that cannot be used; lm-eval is missing or does not know a task.
    """
    args: GKDConfig = trainer.args
    about = recipe.settings.run
    rows = next(data[name] for name in ("prompts", "eval", "train") if data.get(name) is not None)
    if data.get("prompts") is None and data.get("eval") is None:
        logger.warning("no held-out rows: the before/after table is measured on rows of the training set")
    rows = rows.select(range(min(len(rows), about.num_eval_prompts)))
    prompts, kept = _prompts(rows, trainer)
    if len(prompts) < about.num_eval_prompts:
        logger.info(
            "num_eval_prompts=%d: there are %d, all of them are measured", about.num_eval_prompts, len(prompts)
        )
    held_out, starts = _held_out(data, trainer)
    teacher = teacher_of(trainer)
    if teacher is None:
        logger.warning("there is no single teacher in this process: only the student is measured, by itself")
    score = None
    if recipe.score is not None or recipe.corpus_score is not None:
        score = TaskScore([rows[number] for number in kept], recipe.score, recipe.corpus_score)
    public = None
    if about.lm_eval_tasks is not None:
        public = PublicTasks(about.lm_eval_tasks, about.lm_eval_limit, args.per_device_eval_batch_size, args.seed)
    return Evaluator(
        teacher,
        trainer.processing_class,
        prompts,
        held_out,
        trainer.rollouts["student"].settings,
        trainer.loss_settings,
        teacher_sampling=trainer.rollouts["teacher"].settings,
        seed=args.seed,
        score=score,
        public_tasks=public,
        held_out_starts=starts,
        batch_size=args.per_device_eval_batch_size,
        accelerator=trainer.accelerator,
        fold_adapter=args.fold_adapter,
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
        self.before = self.evaluator.measure(self.trainer.model_wrapped, "student before")
        of_teacher = {}
        if self.evaluator.teacher is not None:
            self.teacher = self.evaluator.measure(self.evaluator.teacher, "teacher")
            of_teacher = self.teacher.as_log("eval_teacher")
        self.trainer.add_callback(LogAtStart(self.trainer, {**self.before.as_log("eval_before"), **of_teacher}))

    def measure_after(self) -> None:
        """Measure the trained student and compare. A collective."""
        assert self.evaluator is not None
        assert self.before is not None
        self.after = self.evaluator.measure(self.trainer.model_wrapped, "student after")
        self.trainer.log(self.after.as_log("eval_after"))
        self.comparison = as_dict(self.before, self.after, self.teacher)

    def finish(self, output_dir: str, seconds: float, dataset_name: str | None) -> dict[str, Any]:
        """Write evaluation.json and the plots; returns what the model card should say (fields of `CardInfo`)."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.comparison is not None:
            text = json.dumps(self.comparison, indent=2, ensure_ascii=False)
            (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        plots = write_plots(self.trainer.state.log_history, folder / "plots", self.comparison)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return {
            "datasets": [Repo(dataset_name)] if dataset_name else [],
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


def _prompts(rows: Dataset, trainer: GKDTrainer) -> tuple[list[list[int]], list[int]]:
    """Prompt ids, and the number of each one's row."""
    prepared = _prepared(rows, trainer, "evaluation prompts", max_length=None)
    return [prompt_of(row) for row in prepared], list(prepared["row"])


def _prepared(rows: Dataset, trainer: GKDTrainer, name: str, max_length: int | None) -> Dataset:
    """Rows in ids, cut as for the training; rows without an answer are welcome."""
    args: GKDConfig = trainer.args
    prepared, _ = prepare_dataset(
        rows,
        trainer.processing_class,
        max_length=max_length,
        max_prompt_length=args.prompt_limit,
        overlong_prompt=args.overlong_prompt,
        overlong_row=args.overlong_row,
        assistant_turns=args.assistant_turns,
        prompt_only_ok=True,
        prompts_needed=max_length is None,  # an answer's perplexity needs none
        name=name,
        **trainer.encoding,
    )
    return prepared


def _held_out(data: dict[str, Any], trainer: GKDTrainer) -> tuple[list[list[int]], list[int] | None]:
    """Token ids for the perplexity, and where each one's targets start."""
    texts = data.get("held_out_text")
    limit = trainer.args.max_length
    if texts is not None:
        ids = [trainer.processing_class(text)["input_ids"][:limit] for text in texts]
        return [row for row in ids if len(row) > 1], None
    if data.get("eval") is None:
        return [], None
    prepared = trainer.eval_dataset
    if prepared is None:  # eval_strategy="no": not evaluated while it trains, but measured before and after
        first = data["eval"].select(range(min(len(data["eval"]), HELD_OUT_ROWS)))
        prepared = _prepared(first, trainer, "held-out answers", max_length=limit)
    rows = [row for row in prepared if 0 < row["prompt_length"] < len(row["input_ids"])]
    rows = rows[:HELD_OUT_ROWS]
    return [row["input_ids"] for row in rows], [row["prompt_length"] for row in rows]
