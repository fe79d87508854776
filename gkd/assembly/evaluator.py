"""The evaluation of a run, made from what its trainer holds: its held-out prompts, its scores, its teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gkd.config.fields import GKDConfig
from gkd.data.aligned_view import Alignment
from gkd.data.prepare import prepare_dataset
from gkd.data.sequences import EndMap, sequence_of
from gkd.evaluation.aligned import AlignedSubject
from gkd.evaluation.harness import Evaluator
from gkd.evaluation.public_tasks import PublicTasks
from gkd.evaluation.several import Member, SeveralSubject
from gkd.evaluation.subject import Conditions, Subject, subject_of
from gkd.evaluation.task_score import CorpusScore, Score, TaskScore
from gkd.evaluation.view import TeacherReads
from gkd.loss.settings import LossSettings
from gkd.rollouts.base import Rollout
from gkd.rollouts.hygiene import Hygiene
from gkd.teachers.base import Teacher

logger = logging.getLogger(__name__)


class Assembled(Protocol):
    """What of a run must stand to evaluate it, as `GKDTrainer` holds it; the attributes are the parts of that name.

    Attributes:
        processing_class: the tokenizer.
        encoding: what rows are prepared with beside the fields.
        eval_dataset: prepared rows, or None.
    """

    args: GKDConfig
    accelerator: Accelerator
    processing_class: PreTrainedTokenizerBase
    encoding: dict[str, Any]
    eval_dataset: Any
    teacher: Teacher
    rollouts: dict[str, Rollout]
    loss_settings: LossSettings
    hygiene: Hygiene
    alignment: Alignment | None


@dataclass(frozen=True)
class Questions:
    """What models are measured on, in token ids.

    Args:
        prompts: each is answered.
        held_out: texts for the perplexity; may be empty.
        starts: where the targets of each text start; None is behind its first token.
        teacher_prompts: what the teacher answers; None is the same. teacher_contexts: what it reads in front of each
            text's targets; None is the same.
        teachers, held_out_teachers: numbers of the prompts' and of the texts' teachers, of several; none where a text
            is nobody's.
    """

    prompts: list[list[int]]
    held_out: list[list[int]]
    starts: list[int] | None
    teacher_prompts: list[list[int]] | None = None
    teacher_contexts: list[list[int]] | None = None
    teachers: tuple[int, ...] = ()
    held_out_teachers: tuple[int, ...] = ()

    def as_the_teacher_reads_them(self, end_map: EndMap | None) -> TeacherReads | None:
        """None where that is as the student does."""
        if self.teacher_prompts is None and self.teacher_contexts is None and end_map is None:
            return None
        contexts = self.teacher_contexts
        if contexts is None and self.starts is not None:
            contexts = [ids[:start] for ids, start in zip(self.held_out, self.starts, strict=True)]
        return TeacherReads(self.teacher_prompts or self.prompts, contexts or (), end_map)


def make_evaluator(
    run: Assembled,
    questions: Questions,
    *,
    score: TaskScore | None = None,
    public_tasks: PublicTasks | None = None,
    draft_tokens: int | None = None,
    num_samples: int = 3,
) -> Evaluator:
    """The harness with a run's teacher, sampling and loss; what is asked beside is as in `Evaluator`.

    Raises:
        ValueError: the student is to be measured as a draft, and there is no teacher here that it could write for.
    """
    args, several = run.args, bool(run.args.teacher_names)
    sampling = run.rollouts["teacher"].settings
    if several:
        sampling = replace(sampling, stop_ids=run.hygiene.stop_ids["teacher"])
    elif run.alignment is not None:  # its text is looked at in the student's tokens
        sampling = replace(sampling, stop_ids=run.rollouts["student"].settings.stop_ids)
    teacher = _teacher(run, questions.teachers)
    if draft_tokens is not None and (several or run.teacher.model is None or run.alignment is not None):
        raise ValueError(
            f"draft_tokens={draft_tokens} needs one teacher in this process, with the student's tokens, that the "
            "student could write drafts for: name teacher_model_name_or_path, or leave it out"
        )
    return Evaluator(
        teacher,
        run.processing_class,
        questions.prompts,
        questions.held_out,
        run.rollouts["student"].settings,
        run.loss_settings,
        teacher_sampling=sampling,
        conditions=Conditions(args.seed, args.per_device_eval_batch_size, run.accelerator, args.fold_adapter),
        score=score,
        public_tasks=public_tasks,
        held_out_starts=questions.starts,
        teacher_reads=questions.as_the_teacher_reads_them(run.hygiene.end_map),
        teachers=questions.teachers if several else (),
        held_out_teachers=questions.held_out_teachers if several else (),
        draft_tokens=draft_tokens,
        num_samples=num_samples,
        teacher_follows=run.teacher.follows,
    )


def _teacher(run: Assembled, numbers: tuple[int, ...]) -> Subject | None:
    """What the models are compared with: the teacher, or each row's own."""
    names = run.args.teacher_names
    if run.alignment is not None:
        assert run.hygiene.rewriting is not None
        model = subject_of(run.teacher)
        assert model is not None, "a teacher that is compared is here or on a server"
        return AlignedSubject(model, run.alignment, run.hygiene.rewriting, run.rollouts["teacher"].settings)
    if not names:
        return subject_of(run.teacher)
    settings = run.teacher.settings_of_each()
    members = []
    for name, teacher, rollout, loss in zip(
        names, run.teacher.each(), run.rollouts["teacher"].each(), settings, strict=True
    ):
        subject = subject_of(teacher)
        assert subject is not None, "a teacher that is neither here nor on a server"
        members.append(Member(name, subject, rollout.settings, loss))
    return SeveralSubject(tuple(members), numbers)


HELD_OUT_ROWS = 256  # answers of the eval rows that the perplexity is measured on, when no texts are given


class Asked(Protocol):
    """How much is measured: fields of `gkd.recipe.settings.RunArguments`."""

    num_eval_prompts: int
    lm_eval_tasks: str | None
    lm_eval_limit: int | None
    draft_tokens: int | None


def evaluator_of(
    run: Assembled,
    data: dict[str, Any],
    asked: Asked,
    *,
    score: Score | None = None,
    corpus_score: CorpusScore | None = None,
) -> Evaluator:
    """The harness of a recipe, on prompts that are fixed before the training.

    Args:
        run: what stands ready.
        data: what the recipe's `load_data` gave: `prompts` (rows to measure on; the first rows of `eval`, else of
            `train`, when it is missing) and `held_out_text` (texts; the answers of `eval` when it is missing).
        asked: how much is measured.
        score, corpus_score: the recipe's.

    Raises:
        ValueError: rows that cannot be used; lm-eval is missing or does not know a task.
    """
    args = run.args
    rows = next(data[name] for name in ("prompts", "eval", "train") if data.get(name) is not None)
    if data.get("prompts") is None and data.get("eval") is None:
        logger.warning("no held-out rows: the before/after table is measured on rows of the training set")
    rows = rows.select(range(min(len(rows), asked.num_eval_prompts)))
    asked_rows = _prepared(rows, run, "evaluation prompts", max_length=None)
    sequences = [sequence_of(row) for row in asked_rows]
    prompts = [sequence.prompt for sequence in sequences]
    teacher_prompts = [sequence.teacher_prompt for sequence in sequences]
    if len(prompts) < asked.num_eval_prompts:
        logger.info(
            "num_eval_prompts=%d: there are %d, all of them are measured", asked.num_eval_prompts, len(prompts)
        )
    questions = replace(
        _held_out(data, run),
        prompts=prompts,
        teacher_prompts=None if teacher_prompts == prompts else teacher_prompts,
        teachers=tuple(sequence.teacher for sequence in sequences),
    )
    of_task = None
    if score is not None or corpus_score is not None:
        of_task = TaskScore([rows[number] for number in asked_rows["row"]], score, corpus_score)
    public = None
    if asked.lm_eval_tasks is not None:
        public = PublicTasks(asked.lm_eval_tasks, asked.lm_eval_limit, args.per_device_eval_batch_size, args.seed)
    return make_evaluator(run, questions, score=of_task, public_tasks=public, draft_tokens=asked.draft_tokens)


def _prepared(rows: Dataset, run: Assembled, name: str, max_length: int | None) -> Dataset:
    """Rows in ids, cut as for the training; rows without an answer are welcome."""
    args = run.args
    prepared, _ = prepare_dataset(
        rows,
        run.processing_class,
        max_length=max_length,
        max_prompt_length=args.prompt_limit,
        overlong_prompt=args.overlong_prompt,
        overlong_row=args.overlong_row,
        assistant_turns=args.assistant_turns,
        prompt_only_ok=True,
        prompts_needed=max_length is None,  # an answer's perplexity needs none
        name=name,
        teachers=args.teacher_names,
        **run.encoding,
    )
    return prepared


def texts_in_ids(texts: Iterable[str], run: Assembled) -> list[list[int]]:
    """Token ids of texts, up to `max_length`; those without a target are left out."""
    ids = [run.processing_class(text)["input_ids"][: run.args.max_length] for text in texts]
    return [row for row in ids if len(row) > 1]


def _held_out(data: dict[str, Any], run: Assembled) -> Questions:
    """What the perplexity is measured on; no prompts yet."""
    texts = data.get("held_out_text")
    if texts is not None:
        return Questions([], texts_in_ids(texts, run), None)
    if data.get("eval") is None:
        return Questions([], [], None)
    prepared = run.eval_dataset
    if prepared is None:  # eval_strategy="no": not evaluated while it trains, but measured before and after
        first = data["eval"].select(range(min(len(data["eval"]), HELD_OUT_ROWS)))
        prepared = _prepared(first, run, "held-out answers", max_length=run.args.max_length)
    rows = [row for row in prepared if 0 < row["prompt_length"] < len(row["input_ids"])]
    sequences = [sequence_of(row) for row in rows[:HELD_OUT_ROWS]]
    contexts = [sequence.teacher_context or sequence.input_ids[: sequence.prompt_length] for sequence in sequences]
    return Questions(
        [],
        [sequence.input_ids for sequence in sequences],
        [sequence.prompt_length for sequence in sequences],
        teacher_contexts=contexts if any(sequence.has_view for sequence in sequences) else None,
        held_out_teachers=tuple(sequence.teacher for sequence in sequences),
    )
