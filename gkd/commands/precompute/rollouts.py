"""`gkd precompute --student`: the student answers a recipe's training prompts before its training.

Offline on-policy distillation: the first rollouts of a student, written once, and scored once by the teacher
(`--scores`). They are a data set in token ids, whose rows say which student has written them: a run on them needs no
engine, and with the scores no teacher; one with another student is refused (`gkd.assembly.student.check_written_by`).
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from datasets import Dataset

from gkd.commands.precompute.answers import Precomputation, answered_rows, fill, public_name
from gkd.common.environment import installed_versions
from gkd.common.redact import redact_command
from gkd.data.token_rows import WRITTEN_BY
from gkd.models.fingerprint import fingerprint_at_start
from gkd.recipe.build import copied, measuring_trainer, student_name
from gkd.recipe.capture import Recipe
from gkd.recipe.rows import recipe_data
from gkd.report.dataset_folder import check_folder, push_folder, write_folder
from gkd.rollouts.kept import KeptRollout, key_of
from gkd.rollouts.store import open_store

_KEPT = "_student_sequences"  # in the recipe's output_dir, so that a run that was stopped goes on


def precompute_rollouts(recipe: Recipe, output: str | None, push_to: str | None = None) -> None:
    """Let the student answer a recipe's training prompts, once each, and write the answers as a data set.

    What is there already is not made again, so a run that was stopped goes on where it was. Several processes
    (`accelerate launch`) share the work.

    Args:
        recipe: from `gkd.recipe.capture.capture`.
        output: folder of the data set. push_to: repository on the Hub.

    Raises:
        ValueError: no folder, student or teacher is named; the folder holds something else; the teacher has another
            tokenizer.
    """
    if output is None:
        raise ValueError("--student needs a folder for what the student writes: pass --precompute_output DIR")
    args = recipe.settings.training
    if args.teacher_tokenizer_alignment is not None:
        raise ValueError(
            f"--student does not go with teacher_tokenizer_alignment={args.teacher_tokenizer_alignment!r}: rows in "
            "token ids hold the student's only; leave --student out"
        )
    check_folder(output)
    data = recipe_data(recipe.load_data, recipe.settings)
    with measuring_trainer(_all_written(recipe), data, recipe.teacher_view, most=None) as trainer:
        work, mark = _work(recipe, trainer, data)
        fill(work)
        if work.accelerator.is_main_process:
            rows, left_out = answered_rows(work)
            rows = rows.add_column(WRITTEN_BY, [mark] * len(rows))
            if args.teacher_names:
                rows = rows.add_column("teacher", _teachers(trainer, rows))
            write_folder(rows, output, _record(recipe, work, mark, len(rows), left_out), work.held_out)
            _tell(recipe, output, len(rows), left_out)
            if push_to is not None:
                private = bool(args.hub_private_repo)
                print(f"pushed to {push_folder(output, push_to, args.hub_token, private)}")
        work.accelerator.wait_for_everyone()
    del trainer, work
    gc.collect()  # the models go before the teacher is loaded to score


def settings_on(output: str) -> list[str]:
    """Flags with which a recipe trains on what the student has written."""
    return ["--dataset_name", output, "--lmbda", "0", "--seq_kd", "false"]


def _all_written(recipe: Recipe) -> Any:
    """The recipe's settings, where the student writes every row."""
    settings = copied(recipe.settings)
    args = settings.training
    args.lmbda, args.seq_kd, args.num_completions, args.rollout_every = 1.0, False, 1, 1
    args.resume_from_checkpoint, args.collapse_guard = None, "off"
    return replace(settings, run=replace(settings.run, evaluate_before_and_after=False))


def _work(recipe: Recipe, trainer: Any, data: dict[str, Any]) -> tuple[Precomputation, str]:
    args, accelerator = trainer.args, trainer.accelerator
    rollout, mark = trainer.rollouts["student"], fingerprint_at_start(accelerator.unwrap_model(trainer.model))
    folder = os.path.join(str(recipe.settings.training.output_dir), _KEPT)
    notes = {"student": student_name(recipe.settings), "versions": installed_versions()}
    store = open_store(folder, key_of(rollout.settings, args.seed, mark), notes)
    work = Precomputation(
        rows=trainer.train_dataset,
        evaluation=[],
        tokenizer=trainer.processing_class,
        teacher=None,
        answers=KeptRollout(rollout, store, accelerator),
        hygiene=trainer.hygiene,
        accelerator=accelerator,
        batch_size=args.rollout_batch_size or 4 * args.per_device_train_batch_size,
        held_out={name: part for name, part in data.items() if name != "train"},
        source="student",
    )
    return work, mark


def _teachers(trainer: Any, rows: Dataset) -> list[str]:
    """The names of the rows' teachers, of several."""
    prepared = trainer.train_dataset
    of_row = dict(zip(prepared["row"], prepared["teacher"], strict=True))
    return [trainer.args.teacher_names[of_row[row]] for row in rows["source_row"]]


def _record(recipe: Recipe, work: Precomputation, mark: str, kept: int, left_out: dict[str, int]) -> dict[str, Any]:
    """How the rows were made, as JSON."""
    script, model = recipe.settings.script, recipe.settings.model
    return {
        "rows": kept,
        "left_out": left_out,
        "student": public_name(model.model_name_or_path),
        "student_revision": model.model_revision,
        WRITTEN_BY: mark,
        "key": work.rollout.store.about()["key"],
        "prompts": {
            "dataset": ", ".join(str(public_name(name)) for name in script.names) or None,
            "split": script.dataset_train_split,
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "command": redact_command([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def _tell(recipe: Recipe, output: str, number: int, left_out: dict[str, int]) -> None:
    told = ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count)
    scores = recipe.settings.training.teacher_scores_dir
    more = [] if scores is None else ["--teacher_scores_dir", scores, "--evaluate_before_and_after", "false"]
    file = next((arg for arg in sys.argv[1:] if arg.endswith(".py")), "RECIPE")
    print(f"{number:,} rows of the student's in {output}{f' (left out: {told})' if told else ''}. To train on them:")
    print(f"  {shlex.join(['gkd', 'run', file, *settings_on(output), *more])}")
