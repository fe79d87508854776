"""`gkd evaluate`: what a run measures before and after training, for a recipe's models as they are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gkd.comparison import LEGEND, as_dict, format_estimate, format_label
from gkd.comparison import table as comparison_table
from gkd.measures import METRICS, Measures
from gkd.recipe import Recipe
from gkd.report import Report
from gkd.run import build_trainer
from gkd.settings import Settings
from gkd.trainer import GKDTrainer

TRAIN_ROWS = 256  # of the training set, which only the set-up of a trainer needs


def evaluate_recipe(recipe: Recipe, adapter: str | None) -> list[Measures]:
    """Measure the student, the student with an adapter, and the teacher on the recipe's held-out prompts.

    Args:
        recipe: as `gkd.recipe.capture` gives it. Its `use_peft` is set aside: nothing is trained.
        adapter: folder or name of a PEFT adapter; None = the student as it is.

    Returns:
        "student", "student + adapter" (with one), "teacher".

    Raises:
        ValueError: what a run would refuse, or a folder that holds no adapter.
    """
    if adapter is not None and os.path.isdir(adapter) and not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(
            f"--adapter {adapter}: the folder has no adapter_config.json. Is it a whole model? Then pass it as "
            f"--model_name_or_path {adapter}"
        )
    settings = recipe.settings
    settings.model.use_peft = False
    data = recipe.load_data(settings)
    with measuring_trainer(settings, data) as trainer:
        if trainer.teacher_model is None:
            raise ValueError("the teacher is on a server: it is needed here, name it by teacher_model_name_or_path")
        evaluator = Report(trainer, data, recipe.score, settings.run.num_eval_prompts).evaluator
        columns = [evaluator.measure(trainer.model, "student")]
        if adapter is not None:
            columns.append(evaluator.measure(_with_adapter(trainer, adapter), "student + adapter"))
        return [*columns, evaluator.measure(trainer.teacher_model, "teacher")]


@contextmanager
def measuring_trainer(settings: Settings, data: dict[str, Any]) -> Iterator[GKDTrainer]:
    """The trainer of a run, with its models, tokenizer and sampling, that leaves nothing behind on disk or Hub."""
    train = data["train"]
    with tempfile.TemporaryDirectory() as folder:
        args = settings.training
        args.output_dir, args.push_to_hub, args.report_to, args.teacher_cache_dir = folder, False, [], "off"
        yield build_trainer(settings, {**data, "train": train.select(range(min(len(train), TRAIN_ROWS)))})


def _with_adapter(trainer: GKDTrainer, adapter: str) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(trainer.model, adapter)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--adapter {adapter} does not load into this student: {error}") from error


def results_table(columns: list[Measures]) -> Table:
    """The measures side by side; with an adapter, whether it improves on the student."""
    if len(columns) == 3:
        return comparison_table(columns[0], columns[1], columns[2])
    out = Table(title="Student and teacher", title_justify="left", caption=LEGEND)
    out.add_column("Measure")
    for column in columns:
        out.add_column(column.name, justify="right", no_wrap=True)
    for key, metric in METRICS.items():
        if any(key in column.values for column in columns):
            cells = [Text(format_estimate(metric, column.values.get(key))) for column in columns]
            out.add_row(Text(format_label(metric)), *cells)
    return out


def as_json(columns: list[Measures]) -> dict[str, Any]:
    """All numbers, with standard errors and counts; with an adapter, the comparison too."""
    models = {column.name: {key: estimate.as_dict() for key, estimate in column.values.items()} for column in columns}
    samples = {column.name: [{"prompt": p, "completion": c} for p, c in column.samples] for column in columns}
    out = {"settings": columns[0].settings, "models": models, "samples": samples}
    return {**out, "comparison": as_dict(columns[0], columns[1], columns[2])} if len(columns) == 3 else out
