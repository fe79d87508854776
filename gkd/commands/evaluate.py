"""`gkd evaluate`: what a run measures before and after training, for a recipe's models as they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.table import Table
from rich.text import Text
from torch import nn

from gkd.assembly.evaluator import evaluator_of
from gkd.evaluation.measures import METRICS, Measures
from gkd.evaluation.subject import LocalSubject
from gkd.models.adapters import adapter_folder, load_adapter
from gkd.models.shared_weights import second_model
from gkd.recipe.build import copied, measuring_trainer
from gkd.recipe.capture import Recipe
from gkd.recipe.rows import recipe_data
from gkd.report.comparison import MEASURE_WIDTH, as_dict, footnotes, format_estimate, format_label
from gkd.report.comparison import table as comparison_table
from gkd.training.trainer import GKDTrainer

WITH_ADAPTER = "student + adapter"  # the name of that column


def evaluate_recipe(recipe: Recipe, adapter: str | None) -> list[Measures]:
    """Measure the student, the student with an adapter, and the teacher on the recipe's held-out prompts.

    Args:
        recipe: as `gkd.recipe.capture.capture` gives it. Its `use_peft` is set aside, since nothing is trained, unless
            the teacher shares the student's weights or these are packed: a new adapter changes nothing.
        adapter: folder or name of a PEFT adapter; None = the student as it is.

    Returns:
        "student", "student + adapter" (with one), "teacher" (where there is one that can be measured).

    Raises:
        ValueError: what a run would refuse, or a folder that holds no adapter.
    """
    if adapter is not None and os.path.isdir(adapter) and not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(
            f"--adapter {adapter}: the folder has no adapter_config.json. Is it a whole model? Then pass it as "
            f"--model_name_or_path {adapter}"
        )
    if adapter is not None:
        adapter = str(adapter_folder(adapter, "--adapter"))
    settings = copied(recipe.settings)
    model = settings.model
    model.use_peft &= settings.training.shares_weights or model.load_in_4bit or model.load_in_8bit
    # The harness lets every model write in this process; a server for the rollouts would want a student in training.
    settings.training.rollout_backend, settings.training.rollout_server_url = "hf", None
    settings.training.rollout_server = None
    data = recipe_data(recipe.load_data, settings)
    with measuring_trainer(settings, data, recipe.teacher_view) as trainer:
        evaluator = evaluator_of(trainer, data, settings.run, score=recipe.score, corpus_score=recipe.corpus_score)
        columns = [evaluator.measure(LocalSubject(trainer.model), "student")]
        if adapter is not None:
            columns.append(evaluator.measure(LocalSubject(_with_adapter(trainer, adapter)), WITH_ADAPTER))
        if evaluator.teacher is not None:
            columns.append(evaluator.measure(evaluator.teacher, "teacher"))
        return columns


def _with_adapter(trainer: GKDTrainer, adapter: str) -> nn.Module:
    own = isinstance(trainer.model, PeftModel)  # where the teacher shares weights; the student is then in two models
    return load_adapter(second_model(trainer.model) if own else trainer.model, adapter, "--adapter")


def results_table(columns: list[Measures]) -> Table:
    """The measures side by side; with an adapter, whether it improves on the student."""
    if len(columns) > 1 and columns[1].name == WITH_ADAPTER:
        return comparison_table(columns[0], columns[1], columns[2] if len(columns) > 2 else None)
    caption = Text("\n".join(footnotes(columns[0].settings)))
    out = Table(title="Student and teacher", title_justify="left", caption=caption)
    out.add_column("Measure", min_width=MEASURE_WIDTH)
    for column in columns:
        out.add_column(column.name, justify="right", no_wrap=True)
    for key, metric in {**METRICS, **columns[0].extra}.items():
        if any(key in column.values for column in columns):
            cells = [Text(format_estimate(metric, column.values.get(key))) for column in columns]
            out.add_row(Text(format_label(metric)), *cells)
    return out


def as_json(columns: list[Measures]) -> dict[str, Any]:
    """All numbers, with standard errors and counts; with an adapter, the comparison too."""
    models = {column.name: {key: estimate.as_dict() for key, estimate in column.values.items()} for column in columns}
    samples = {column.name: [{"prompt": p, "completion": c} for p, c in column.samples] for column in columns}
    out = {"settings": columns[0].settings, "models": models, "samples": samples}
    if len(columns) > 1 and columns[1].name == WITH_ADAPTER:
        out["comparison"] = as_dict(columns[0], columns[1], columns[2] if len(columns) > 2 else None)
    return out
