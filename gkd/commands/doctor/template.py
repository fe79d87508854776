"""The doctor's look at the chat template: how a teacher likes its own answers in its own form and in the student's.

A teacher that reads chats in a form which it was not trained on scores them worse than it could, and nothing in the
loss shows that. So it answers a few prompts in its own form, and its perplexity of these answers is measured in both.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

from datasets import Dataset

from gkd.assembly.models import tokenizer_of_teacher
from gkd.assembly.reading import teacher_reading
from gkd.assembly.rows import row_options
from gkd.commands.doctor.view import Diagnosis
from gkd.data.prepare import prepare_dataset
from gkd.data.sequences import join, sequence_of
from gkd.data.teacher_rows import OwnTemplate, TeacherReading
from gkd.evaluation.measures import Estimate, ratio_estimate
from gkd.evaluation.subject import Conditions, Subject
from gkd.training.trainer import GKDTrainer

_NOISE = 2.0  # standard errors


@dataclass(frozen=True)
class Forms:
    """Nats per token of a teacher's own answers, in its `own` form and in the `student`'s, and the paired `difference`
    (student's - own)."""

    own: Estimate
    student: Estimate
    difference: Estimate


def examine_template(out: Diagnosis, trainer: GKDTrainer, teacher: Subject, rows: Dataset, how: Conditions) -> None:
    """Both perplexities, where the teacher has a template of its own that writes these rows otherwise.

    Args:
        trainer: as the run has it. teacher: its teacher.
        rows: a few train rows, as they are stored.
        how: seed, batch size and precision.
    """
    own = _own_template(trainer)
    found = None if own is None else in_both_forms(trainer, own, teacher, rows, how)
    if found is None:
        return
    chosen = trainer.args.teacher_template
    ppl = [f"{math.exp(estimate.value):.4g}" for estimate in (found.own, found.student)]
    read = [", which it reads" if chosen == form else "" for form in ("own", "student")]
    message = (
        f"perplexity of the teacher's own answers: {ppl[0]} in its own template{read[0]}; {ppl[1]} in the "
        f"student's{read[1]} ({found.own.count} answers)"
    )
    noise = _NOISE * (found.difference.error or 0.0)
    if chosen == "student" and found.difference.value > noise:
        remedy = "let it read its own (teacher_template=own), or give the student the teacher's (chat_template_path)"
        out.add("Teacher's template", "warning", f"{message}: it is worse in the student's form", remedy)
    elif chosen == "own" and found.difference.value < -noise:
        remedy = (
            "is this the template that it was trained with? Else let it read the student's (teacher_template=student)"
        )
        out.add("Teacher's template", "warning", f"{message}: it is worse in its own form", remedy)
    else:
        out.add("Teacher's template", "ok", message)


def _own_template(trainer: GKDTrainer) -> OwnTemplate | None:
    """The one that the teacher reads, or could read."""
    args, tokenizer, reading = trainer.args, trainer.processing_class, trainer.encoding["reading"]
    if reading.own:
        found: OwnTemplate | None = reading.template(0)
        return found
    student, model = trainer.accelerator.unwrap_model(trainer.model), trainer.teacher_model
    teacher_tokenizer = tokenizer_of_teacher(model, student, args)
    if teacher_tokenizer is None or not teacher_tokenizer.chat_template:
        return None
    args = copy.copy(args)
    args.teacher_template = "own"
    try:
        return teacher_reading(args, tokenizer, student, model, teacher_tokenizer=teacher_tokenizer).template(0)
    except ValueError:  # how its turns end would be a guess
        return None


def in_both_forms(
    trainer: GKDTrainer, own: OwnTemplate, teacher: Subject, rows: Dataset, how: Conditions
) -> Forms | None:
    """The teacher's answers, scored in both forms; None where these rows are the same in both, or no chats."""
    view = trainer.encoding["reading"].view
    try:
        own_prompts, prompts = (
            _prompts(trainer, rows, reading) for reading in (TeacherReading(view, (own,)), TeacherReading(view))
        )
    except ValueError:  # rows that have no turns, or that one of the templates cannot write
        return None
    if own_prompts == prompts and own.end_map is None:
        return None
    sampling = trainer.rollouts["teacher"].settings
    end = () if own.end_map is None else (own.end_map[1],)
    sampling = replace(sampling, stop_ids=tuple(sorted({*sampling.stop_ids, *end})))
    answers = teacher.generate(own_prompts, sampling, how)
    sequences = [
        join(prompt, answer, "teacher", number, teacher_prompt=own_prompt, end_map=own.end_map)
        for number, (prompt, own_prompt, answer) in enumerate(zip(prompts, own_prompts, answers, strict=True))
        if answer
    ]
    if not sequences:
        return None
    in_own = [sequence.as_the_teacher_reads_it() for sequence in sequences]
    in_students = [replace(row, teacher_context=[], teacher_prompt_ids=[], teacher_last=None) for row in sequences]
    sums = [[math.fsum(values) for values in teacher.nll(form, how, lambda _: None)] for form in (in_own, in_students)]
    counts = [sequence.num_targets for sequence in sequences]
    difference = [b - a for a, b in zip(*sums, strict=True)]
    return Forms(*(ratio_estimate(values, counts) for values in (*sums, difference)))


def _prompts(trainer: GKDTrainer, rows: Dataset, reading: TeacherReading) -> list[list[int]]:
    """What the teacher would write from; no row of no use is kept, whatever the reading."""
    options = {**row_options(trainer.args), **trainer.encoding, "reading": reading, "num_proc": None}
    prepared, _ = prepare_dataset(rows, trainer.processing_class, prompt_only_ok=True, name="doctor's", **options)
    return [sequence_of(row).teacher_prompt for row in prepared]
