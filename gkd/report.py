"""The report of a run: student before and after and the teacher in one harness; table, JSON, plots, card facts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from gkd.card import Repo
from gkd.comparison import as_dict, samples_table, table
from gkd.config import GKDConfig
from gkd.data import prepare_dataset
from gkd.evaluate import Evaluator
from gkd.measures import Measures
from gkd.plots import write_plots
from gkd.trainer import GKDTrainer

logger = logging.getLogger(__name__)

# What the console shows; everything that was measured stands in evaluation.json and on the card.
HEADLINES = ("divergence_own", "divergence_teacher_text", "perplexity", "ended", "score_greedy", "score_sampled")

Score = Callable[[str, dict[str, Any]], float]


HELD_OUT_ROWS = 256  # answers of the eval rows that the perplexity is measured on, when no texts are given


class Report:
    """Measures around the training, on prompts that are fixed before it.

    Args:
        trainer: the trainer, prepared.
        data: what the recipe's `load_data` gave: `prompts` (rows to measure on; the first rows of `eval`, else of
            `train`, when it is missing) and `held_out_text` (texts; the answers of `eval` when it is missing).
        score: (completion, prompt row) -> task score.
        num_prompts: most prompts to measure on.
    """

    def __init__(self, trainer: GKDTrainer, data: dict[str, Any], score: Score | None, num_prompts: int) -> None:
        self.trainer = trainer
        self.before: Measures | None = None
        self.after: Measures | None = None
        self.teacher: Measures | None = None
        self.comparison: dict[str, Any] | None = None
        rows = next(data[name] for name in ("prompts", "eval", "train") if data.get(name) is not None)
        if data.get("prompts") is None and data.get("eval") is None:
            logger.warning("no held-out rows: the before/after table is measured on rows of the training set")
        rows = rows.select(range(min(len(rows), num_prompts)))
        prompts, kept = _prompts(rows, trainer)
        held_out, starts = _held_out(data, trainer)
        args: GKDConfig = trainer.args
        self.evaluator = Evaluator(
            trainer.teacher.model,
            trainer.processing_class,
            prompts,
            held_out,
            trainer.rollouts["student"].settings,
            trainer.loss_settings,
            teacher_sampling=trainer.rollouts["teacher"].settings,
            seed=args.seed,
            score=None if score is None else lambda i, text: score(text, rows[kept[i]]),
            held_out_starts=starts,
            batch_size=args.per_device_eval_batch_size,
            accelerator=trainer.accelerator,
        )

    def measure_before(self) -> None:
        """Measure the untrained student and the teacher. A collective: every rank calls it."""
        logger.info(
            "measuring the student before training, and the teacher, on %d prompts", len(self.evaluator.prompts)
        )
        self.before = self.evaluator.measure(self.trainer.model_wrapped, "student before")
        self.teacher = self.evaluator.measure(self.trainer.teacher.model, "teacher")
        self.trainer.log({**self.before.as_log("before"), **self.teacher.as_log("teacher_evaluation")})

    def measure_after(self) -> None:
        """Measure the trained student and compare. A collective."""
        assert self.before is not None
        self.after = self.evaluator.measure(self.trainer.model_wrapped, "student after")
        self.trainer.log(self.after.as_log("after"))
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
            console.print(table(self.before, self.after, self.teacher, HEADLINES))
            console.print(samples_table(self.before, self.after))


def _prompts(rows: Dataset, trainer: GKDTrainer) -> tuple[list[list[int]], list[int]]:
    """Prompt ids, and the number of each one's row."""
    args: GKDConfig = trainer.args
    prepared, _ = prepare_dataset(
        rows,
        trainer.processing_class,
        max_length=None,
        max_prompt_length=args.prompt_limit,
        overlong_prompt=args.overlong_prompt,
        prompt_only_ok=True,
        name="evaluation prompts",
    )
    return [row["input_ids"][: row["prompt_length"]] for row in prepared], list(prepared["row"])


def _held_out(data: dict[str, Any], trainer: GKDTrainer) -> tuple[list[list[int]], list[int] | None]:
    """Token ids for the perplexity, and where each one's targets start."""
    texts = data.get("held_out_text")
    limit = trainer.args.max_length
    if texts is not None:
        ids = [trainer.processing_class(text)["input_ids"][:limit] for text in texts]
        return [row for row in ids if len(row) > 1], None
    if data.get("eval") is None or trainer.eval_dataset is None:
        return [], None
    rows = [row for row in trainer.eval_dataset if 0 < row["prompt_length"] < len(row["input_ids"])]
    rows = rows[:HELD_OUT_ROWS]
    return [row["input_ids"] for row in rows], [row["prompt_length"] for row in rows]
