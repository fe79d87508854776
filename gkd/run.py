"""What a recipe calls: from the command line to a trained adapter, its evaluation, plots and model card."""

from __future__ import annotations

import os
import shlex
from contextlib import nullcontext
from typing import Any

from rich.console import Console

import gkd.recipe.quiet  # noqa: F401  (before the libraries that it quietens)
from gkd.assembly.evaluator import evaluator_of
from gkd.common.distribution import check_alone
from gkd.common.launcher import end_with_the_launcher
from gkd.data.held_out import hold_out, warn_of_overlap, with_held_out
from gkd.data.teacher_rows import View
from gkd.evaluation.task_score import CorpusScore, Score
from gkd.recipe.build import build_trainer, student_name
from gkd.recipe.capture import Recipe, count_call, hand_over, is_captured
from gkd.recipe.mistakes import mistakes_in_one_line
from gkd.recipe.report import Report
from gkd.recipe.rows import dataset_by_name, load_rows, recipe_data
from gkd.recipe.run_end import Results, save_weights, write_history
from gkd.recipe.settings import LoadData, RunArguments, Settings, parse
from gkd.training import output_folder
from gkd.training.going_on import check_folder, checkpoint_asked
from gkd.training.origin import write_origin
from gkd.training.progress import close_bars
from gkd.training.token_weights import Own

__all__ = [
    "RunArguments",
    "Settings",
    "build_trainer",
    "dataset_by_name",
    "hold_out",
    "load_rows",
    "parse",
    "run",
    "with_held_out",
]


def run(
    load_data: LoadData = dataset_by_name,
    *,
    defaults: dict[str, Any] | None = None,
    score: Score | None = None,
    corpus_score: CorpusScore | None = None,
    teacher_view: View | None = None,
    token_weights: Own | None = None,
    description: str = "",
    argv: list[str] | None = None,
) -> None:
    """Run a recipe: parse, load, evaluate, train, evaluate, save, write the card, push.

    A user's mistake ends in one line on stderr and exit code 2 (the traceback too when GKD_DEBUG=1).

    Args:
        load_data: settings -> `train` rows, optionally `eval` rows, `prompts` (rows for the before/after evaluation)
            and `held_out_text` (texts for perplexity).
        defaults: the recipe's values for any field of GKDConfig, ModelConfig, ScriptArguments and RunArguments.
        score: (completion, row) -> task score of one prompt row, optional; with reward_weight it is the reward, too.
        corpus_score: (completions, rows) -> one number for all of them (corpus BLEU), optional; its error comes from
            resampling the rows.
        teacher_view: row -> the row whose prompt the teacher reads in its place, optional; the student sees nothing of
            it.
        token_weights: what is known of a micro-batch's targets -> a weight for each, optional
            (`gkd.loss.token_weights.TokenView`).
        description: what the recipe does, for `--help`.
        argv: instead of `sys.argv[1:]`.
    """
    count_call()

    def recipe() -> Recipe:
        settings = parse(defaults or {}, argv, description)
        return Recipe(settings, load_data, score, corpus_score, teacher_view, token_weights)

    if is_captured():
        hand_over(recipe())
    with mistakes_in_one_line():
        check_alone()
        _run(recipe())


def _run(recipe: Recipe) -> None:
    settings, args = recipe.settings, recipe.settings.training
    student_name(settings)
    measure = settings.run.evaluate_before_and_after
    for name in ("lm_eval_tasks", "draft_tokens"):
        value = getattr(settings.run, name)
        if value is not None and not measure:
            raise ValueError(
                f"{name}={value} has no effect with evaluate_before_and_after=False: leave one of them out"
            )
    end_with_the_launcher()
    wanted = checkpoint_asked(args)
    if wanted is not None and wanted is not True:
        check_folder(wanted)  # before models are loaded and measured
    output_folder.make(args.output_dir)
    first = int(os.environ.get("RANK", "0")) == 0
    with output_folder.locked(args.output_dir) if first else nullcontext():
        if wanted is None and not args.overwrite_output_dir:
            output_folder.check_free(args.output_dir, "", overwrite=False)
        _train(recipe)


def _train(recipe: Recipe) -> None:
    settings, args = recipe.settings, recipe.settings.training
    measure = settings.run.evaluate_before_and_after
    data = recipe_data(recipe.load_data, settings)
    trainer = build_trainer(
        settings, data, recipe.teacher_view, reward=recipe.score, token_weights=recipe.token_weights
    )
    evaluator = None
    if measure:
        evaluator = evaluator_of(trainer, data, settings.run, score=recipe.score, corpus_score=recipe.corpus_score)
    if trainer.is_world_process_zero():
        write_origin(trainer, student_name(settings))
    report = Report(trainer, evaluator)
    if report.evaluator is not None:
        held_out = any(data.get(name) is not None for name in ("eval", "prompts"))
        if held_out and trainer.is_world_process_zero():
            warn_of_overlap(trainer.train_dataset, report.evaluator.held_out_prompts())
        report.measure_before()
    try:
        trainer.train(resume_from_checkpoint=trainer.asked_checkpoint())
    finally:
        close_bars(trainer.callback_handler.callbacks)
    save_weights(trainer)  # before anything else can go wrong
    if measure:
        report.measure_after()
    if trainer.is_world_process_zero():
        results = Results(args.output_dir)
        results.write("metrics.jsonl", lambda folder: write_history(trainer, folder))
        facts = results.write(
            "evaluation and plots",
            lambda folder: report.finish(folder, trainer.training_seconds, settings.script.names),
        )
        trainer.card_extras = facts or {}
        results.write("README.md", lambda _: trainer.create_model_card())
        report.show(Console())
        results.raise_for_failures()
        print(f"saved to {args.output_dir}")
        folder = shlex.quote(str(args.output_dir))
        print(f"next: gkd chat {folder}, and gkd export {folder} --to merged (or gguf, ollama)")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=settings.script.dataset_name)
