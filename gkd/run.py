"""What a recipe calls: from the command line to a trained adapter, its evaluation, plots and model card."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback
from trl import get_peft_config

from gkd.checkpoint_files import find
from gkd.config import GKDConfig
from gkd.loading import load_tokenizer
from gkd.progress import ProgressBar, close_bars
from gkd.recipe import Recipe, hand_over, is_captured, mistakes_in_one_line
from gkd.report import Report, evaluator_of
from gkd.settings import (
    LoadData,
    RunArguments,
    Settings,
    dataset_by_name,
    load_rows,
    parse,
    recipe_data,
    set_loading_arguments,
    student_name,
    with_held_out,
)
from gkd.task_score import CorpusScore, Score
from gkd.trainer import GKDTrainer

__all__ = [
    "RunArguments",
    "Settings",
    "build_trainer",
    "dataset_by_name",
    "load_rows",
    "parse",
    "run",
    "with_held_out",
]

logger = logging.getLogger(__name__)


def run(
    load_data: LoadData = dataset_by_name,
    *,
    defaults: dict[str, Any] | None = None,
    score: Score | None = None,
    corpus_score: CorpusScore | None = None,
    description: str = "",
    argv: list[str] | None = None,
) -> None:
    """Run a recipe: parse, load, evaluate, train, evaluate, save, write the card, push.

    A user's mistake ends in one line on stderr and exit code 2 (the traceback too when GKD_DEBUG=1).

    Args:
        load_data: settings -> `train` rows, optionally `eval` rows, `prompts` (rows for the before/after evaluation)
            and `held_out_text` (texts for perplexity).
        defaults: the recipe's values for any field of GKDConfig, ModelConfig, ScriptArguments and RunArguments.
        score: (completion, row) -> task score of one prompt row, optional.
        corpus_score: (completions, rows) -> one number for all of them (corpus BLEU), optional; its error comes from
            resampling the rows.
        description: what the recipe does, for `--help`.
        argv: instead of `sys.argv[1:]`.
    """
    if is_captured():
        hand_over(Recipe(parse(defaults or {}, argv, description), load_data, score, corpus_score))
    with mistakes_in_one_line():
        _run(Recipe(parse(defaults or {}, argv, description), load_data, score, corpus_score))


def _run(recipe: Recipe) -> None:
    settings, args = recipe.settings, recipe.settings.training
    student_name(settings)
    measure = settings.run.evaluate_before_and_after
    if settings.run.lm_eval_tasks is not None and not measure:
        raise ValueError("lm_eval_tasks has no effect with evaluate_before_and_after=False: leave one of them out")
    check_output(args.output_dir)
    data = recipe_data(recipe.load_data, settings)
    trainer = build_trainer(settings, data)
    report = Report(trainer, evaluator_of(trainer, data, recipe) if measure else None)
    if measure:
        report.measure_before()
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=_checkpoint(args))
    finally:
        close_bars(trainer.callback_handler.callbacks)
    seconds = time.perf_counter() - start
    if measure:
        report.measure_after()
    trainer.save_model(args.output_dir, _internal_call=True)  # the push comes last, when all is there
    if trainer.is_world_process_zero():
        _write_history(trainer, args.output_dir)
        trainer.card_extras = report.finish(args.output_dir, seconds, settings.script.dataset_name)
        trainer.create_model_card()
        report.show(Console())
        print(f"saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=settings.script.dataset_name)


def check_output(folder: str) -> None:
    """Make the output folder, before anything is loaded.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir={folder!r} cannot be made: {error.strerror}; name another folder") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output_dir={folder!r} cannot be written to: name another folder, or mend its permissions")


def build_trainer(settings: Settings, data: dict[str, Any]) -> GKDTrainer:
    """Tokenizer, models and trainer from the settings."""
    args, model = settings.training, settings.model
    set_loading_arguments(settings)
    tokenizer = load_tokenizer(
        model.model_name_or_path, trust_remote_code=args.trust_remote_code, revision=model.model_revision
    )
    trainer = GKDTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("eval") if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar())
    return trainer


def _checkpoint(args: GKDConfig) -> str | bool | None:
    """`--resume_from_checkpoint`: a folder, or "true" for the complete one in output_dir that was saved last."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none"):
        return None
    if str(wanted).lower() != "true":
        if not os.path.isdir(wanted):
            raise ValueError(f"resume_from_checkpoint={wanted!r}: there is no such folder")
        return wanted
    checkpoint = find(args.output_dir)
    if checkpoint is None:
        logger.warning("resume_from_checkpoint=true: %s holds no complete checkpoint, starting anew", args.output_dir)
    return checkpoint


def _write_history(trainer: GKDTrainer, output_dir: str) -> None:
    """Every logged line, for plots of one's own."""
    path = Path(output_dir) / "metrics.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
