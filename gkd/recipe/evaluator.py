"""The evaluation of a run, made from its trainer: its held-out prompts, its scores, its teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from gkd.config.fields import GKDConfig
from gkd.data.prepare import prepare_dataset
from gkd.data.sequences import prompt_of
from gkd.evaluation.harness import Evaluator
from gkd.evaluation.public_tasks import PublicTasks
from gkd.evaluation.subject import ServedTeacher
from gkd.evaluation.task_score import TaskScore
from gkd.recipe.capture import Recipe
from gkd.teachers.server import ServerTeacher
from gkd.training.trainer import GKDTrainer

logger = logging.getLogger(__name__)


def teacher_of(trainer: GKDTrainer) -> Any:
    """What the evaluation compares with: the teacher's model, a teacher on a server, or None when there is no single
    teacher that could write and be measured."""
    teacher = trainer.teacher
    if isinstance(teacher, ServerTeacher):
        vocabulary = trainer.accelerator.unwrap_model(trainer.model).config.get_text_config().vocab_size
        return ServedTeacher(teacher, seed=trainer.args.seed, vocabulary=int(vocabulary))
    return teacher.model


@dataclass(frozen=True)
class Questions:
    """What models are measured on, in token ids.

    Args:
        prompts: each is answered.
        held_out: texts for the perplexity; may be empty.
        starts: where the targets of each text start; None is behind its first token.
    """

    prompts: list[list[int]]
    held_out: list[list[int]]
    starts: list[int] | None


def make_evaluator(
    trainer: GKDTrainer,
    questions: Questions,
    *,
    score: TaskScore | None = None,
    public_tasks: PublicTasks | None = None,
    num_samples: int = 3,
) -> Evaluator:
    """The harness with a trainer's teacher, sampling and loss; what is asked beside is as in `Evaluator`."""
    args: GKDConfig = trainer.args
    return Evaluator(
        teacher_of(trainer),
        trainer.processing_class,
        questions.prompts,
        questions.held_out,
        trainer.rollouts["student"].settings,
        trainer.loss_settings,
        teacher_sampling=trainer.rollouts["teacher"].settings,
        seed=args.seed,
        score=score,
        public_tasks=public_tasks,
        held_out_starts=questions.starts,
        batch_size=args.per_device_eval_batch_size,
        num_samples=num_samples,
        accelerator=trainer.accelerator,
        fold_adapter=args.fold_adapter,
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
    questions = Questions(prompts, *_held_out(data, trainer))
    if teacher_of(trainer) is None:
        logger.warning("there is no single teacher in this process: only the student is measured, by itself")
    score = None
    if recipe.score is not None or recipe.corpus_score is not None:
        score = TaskScore([rows[number] for number in kept], recipe.score, recipe.corpus_score)
    public = None
    if about.lm_eval_tasks is not None:
        public = PublicTasks(about.lm_eval_tasks, about.lm_eval_limit, args.per_device_eval_batch_size, args.seed)
    return make_evaluator(trainer, questions, score=score, public_tasks=public)


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


def texts_in_ids(texts: Iterable[str], trainer: GKDTrainer) -> list[list[int]]:
    """Token ids of texts, up to `max_length`; those without a target are left out."""
    ids = [trainer.processing_class(text)["input_ids"][: trainer.args.max_length] for text in texts]
    return [row for row in ids if len(row) > 1]


def _held_out(data: dict[str, Any], trainer: GKDTrainer) -> tuple[list[list[int]], list[int] | None]:
    """Token ids for the perplexity, and where each one's targets start."""
    texts = data.get("held_out_text")
    if texts is not None:
        return texts_in_ids(texts, trainer), None
    if data.get("eval") is None:
        return [], None
    prepared = trainer.eval_dataset
    if prepared is None:  # eval_strategy="no": not evaluated while it trains, but measured before and after
        first = data["eval"].select(range(min(len(data["eval"]), HELD_OUT_ROWS)))
        prepared = _prepared(first, trainer, "held-out answers", max_length=trainer.args.max_length)
    rows = [row for row in prepared if 0 < row["prompt_length"] < len(row["input_ids"])]
    rows = rows[:HELD_OUT_ROWS]
    return [row["input_ids"] for row in rows], [row["prompt_length"] for row in rows]
