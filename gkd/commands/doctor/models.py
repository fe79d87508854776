"""The doctor's look at the models themselves: loaded as a run loads them, they answer prompts and make two steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from datasets import Dataset

from gkd.assembly.evaluator import Questions, make_evaluator, texts_in_ids
from gkd.commands.doctor.alignment import examine_mass
from gkd.commands.doctor.attempt import attempt
from gkd.commands.doctor.cost import STEPS, examine_schedules, examine_time, spread, timed_steps
from gkd.commands.doctor.draft import examine_draft
from gkd.commands.doctor.template import examine_template
from gkd.commands.doctor.view import Diagnosis
from gkd.data.sequences import TokenSequence, sequence_of
from gkd.data.vocabulary import compare_stop_ids
from gkd.evaluation.harness import Evaluator
from gkd.evaluation.measures import Measures
from gkd.evaluation.subject import LocalSubject
from gkd.evaluation.view import answered
from gkd.recipe.build import measuring_trainer
from gkd.recipe.capture import Recipe
from gkd.training.log import TRUNCATION_WARNING
from gkd.training.trainer import GKDTrainer

ROWS_MEASURED, ROLLOUTS = 32, 8
_NAMED = 8  # stop ids that a line names
_SAME = 1e-6  # nats/token; a divergence below it is rounding


def examine_models(out: Diagnosis, recipe: Recipe, data: dict[str, Any], prepared: Dataset) -> None:
    """Load both models as a run does, let them answer, and make two steps."""
    args, schedule = timed_steps(recipe.settings.training, len(prepared))
    examine_schedules(out, recipe.settings.training, schedule.steps)
    number = max(ROWS_MEASURED, STEPS * schedule.timed * args.per_device_train_batch_size)
    usable = data["train"].select(spread(prepared, number))
    out.doing("loading both models")
    settings = replace(recipe.settings, training=args)
    with measuring_trainer(settings, {**data, "train": usable}, recipe.teacher_view) as trainer:
        _sizes(out, trainer)
        out.doing(f"letting both models answer {ROLLOUTS} prompts")
        attempt(out, "Rollouts", lambda: _measure(out, trainer, data, prepared, recipe.settings.run.draft_tokens))
        out.doing(f"making {STEPS} steps")
        attempt(out, "Time", lambda: examine_time(out, trainer, schedule))


def _sizes(out: Diagnosis, trainer: GKDTrainer) -> None:
    student, teacher = trainer.accelerator.unwrap_model(trainer.model), trainer.teacher_model
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    size = f"student {student.num_parameters():,} parameters, {trained:,} of them trained"
    if trainer.args.teacher_names:
        out.add("Models", "ok", f"{size}; {_teachers_in_words(trainer)}")
    elif trainer.teacher.missing:
        out.add("Models", "ok", f"{size}; no teacher")
    elif teacher is None:
        where = "is on a server" if trainer.args.teacher_is_elsewhere else "is not one model of its own"
        out.add("Models", "ok", f"{size}; the teacher {where}")
    else:
        out.add("Models", "ok", f"{size}; teacher {trainer.accelerator.unwrap_model(teacher).num_parameters():,}")
    if trainer.args.teacher_server_url is not None:
        same = "the same ids of a line of text and the special tokens"
        whose = " as the teacher's own tokenizer here" if trainer.alignment is not None else ""
        out.add("Token maps", "ok", f"the teacher's server makes {same}{whose}")
    _stop_ids(out, trainer)


def _teachers_in_words(trainer: GKDTrainer) -> str:
    found = []
    for name, teacher in zip(trainer.args.teacher_names, trainer.teacher.each(), strict=True):
        model = None if teacher.model is None else trainer.accelerator.unwrap_model(teacher.model)
        found.append(f"teacher {name} {'on a server' if model is None else f'{model.num_parameters():,}'}")
    return ", ".join(found)


def _stop_ids(out: Diagnosis, trainer: GKDTrainer) -> None:
    named = {
        who: ", ".join(map(str, ids[:_NAMED])) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
        for who, ids in trainer.stop_ids.items()
    }
    own = trainer.args.teacher_template == "own" or trainer.encoding["reading"].foreign
    if own and trainer.stop_ids["student"] != trainer.stop_ids["teacher"]:
        each = ", ".join(f"{ids} for the {who}" for who, ids in named.items())
        out.add("Stop ids", "ok", f"{each}, which has a template of its own")
        return
    remark = compare_stop_ids(trainer.stop_ids["student"], trainer.stop_ids["teacher"], trainer.processing_class)
    out.add("Stop ids", *(("warning", remark) if remark else ("ok", f"{named['student']} for both")))


def _measure(
    out: Diagnosis, trainer: GKDTrainer, data: dict[str, Any], prepared: Dataset, draft_tokens: int | None
) -> None:
    evaluator = _evaluator(trainer, data, prepared, draft_tokens)
    student = evaluator.measure(LocalSubject(trainer.model), "student")
    out.add_rollouts(student.samples, student.questions)
    found = [student]
    if evaluator.teacher is not None:
        teacher = evaluator.measure(evaluator.teacher, "teacher")
        found.append(teacher)
        _perplexities(out, student, teacher, len(evaluator.held_out))
        _divergence(out, student, evaluator.settings()["divergence"])
        if evaluator.costs is not None:
            examine_draft(out, student, evaluator.costs)
        if evaluator.tokens_differ:
            examine_mass(out, evaluator.teacher, _compared_rows(evaluator, prepared), evaluator.conditions)
        elif not trainer.args.teacher_names:
            rows = data["train"].select(spread(prepared, ROLLOUTS))
            examine_template(out, trainer, evaluator.teacher, rows, evaluator.conditions)
    for measures in found:
        _rollouts(out, measures, trainer.args.most_new_tokens, trainer.args.repetition_threshold)


def _evaluator(trainer: GKDTrainer, data: dict[str, Any], prepared: Dataset, draft_tokens: int | None) -> Evaluator:
    """The harness of a run's evaluation, on a few train rows: prompts, and answers (or texts) for the perplexity."""
    rows = [sequence_of(row) for row in prepared.select(range(min(ROWS_MEASURED, len(prepared))))]
    answered = [row for row in rows if 0 < max(1, row.prompt_length) < len(row.input_ids)]
    held_out = [row.input_ids for row in answered]
    starts: list[int] | None = [max(1, row.prompt_length) for row in answered]
    contexts: list[list[int]] | None = [
        row.teacher_context or row.input_ids[: max(1, row.prompt_length)] for row in answered
    ]
    if not held_out and data.get("held_out_text") is not None:
        held_out, starts, contexts = texts_in_ids(data["held_out_text"][:ROWS_MEASURED], trainer), None, None
    # running text has no prompt: its first half is continued
    halves = [row.input_ids[: -(-len(row.input_ids) // 2)] for row in rows[:ROLLOUTS]]
    prompts = [row.prompt or half for row, half in zip(rows, halves, strict=False)]
    questions = Questions(
        prompts,
        held_out,
        starts,
        teachers=tuple(row.teacher for row in rows[:ROLLOUTS]),
        held_out_teachers=tuple(row.teacher for row in answered) if starts is not None else (),
    )
    if any(row.has_view or row.teacher_prompt_ids for row in rows):
        own = [row.teacher_prompt or half for row, half in zip(rows, halves, strict=False)]
        questions = replace(questions, teacher_prompts=own, teacher_contexts=contexts)
    return make_evaluator(trainer, questions, draft_tokens=draft_tokens, num_samples=ROLLOUTS)


def _compared_rows(evaluator: Evaluator, prepared: Dataset) -> list[TokenSequence]:
    """Answers of the rows, or what the teacher has written where these have none."""
    rows = [sequence_of(row) for row in prepared.select(range(min(ROWS_MEASURED, len(prepared))))]
    answers = [row for row in rows if row.completion_length and row.num_targets]
    written = evaluator.teacher_text()
    return answers or answered(evaluator.prompts, written, evaluator.teacher_reads, source="teacher")


def _perplexities(out: Diagnosis, student: Measures, teacher: Measures, texts: int) -> None:
    if "perplexity" in student.values and "bits_per_byte" in teacher.extra and "perplexity" not in teacher.values:
        bits = [measures.values["bits_per_byte"].value for measures in (student, teacher)]
        _worse(out, "Bits per byte", f"student {bits[0]:.3g}, teacher {bits[1]:.3g} on {texts} texts", bits)
        return
    if "perplexity" not in student.values:
        out.add("Perplexity", "ok", "not measured: the rows have no answers, and load_data gives no held_out_text")
        return
    if "perplexity" not in teacher.values:
        value = student.values["perplexity"].value
        out.add("Perplexity", "ok", f"student {value:.3g} on {texts} texts, which are no teacher's in particular")
        return
    values = [measures.values["perplexity"].value for measures in (student, teacher)]
    _worse(out, "Perplexity", f"student {values[0]:.3g}, teacher {values[1]:.3g} on {texts} texts", values)


def _worse(out: Diagnosis, name: str, message: str, values: list[float]) -> None:
    """A warning where the teacher, the second, is the worse of the two."""
    if values[1] <= values[0]:
        out.add(name, "ok", message)
    else:
        remedy = "is it the right teacher, and was it trained with this chat template? Tune it on this data first"
        out.add(name, "warning", f"{message}: the teacher is the worse of the two", remedy)


def _divergence(out: Diagnosis, student: Measures, name: str) -> None:
    value = student.values["divergence_own"].value
    message = f"{value:.3g} nats/token on the student's own completions ({name})"
    if not math.isfinite(value):
        out.add("Divergence", "error", message, "load the models in bfloat16 or float32, and look for broken weights")
    elif value < _SAME:
        out.add("Divergence", "warning", f"{message}: student and teacher are the same model", "name another teacher")
    else:
        out.add("Divergence", "ok", message)


def _rollouts(out: Diagnosis, measures: Measures, max_new_tokens: int, repetition_threshold: float) -> None:
    """Whether sampled completions end, and whether they go in circles."""
    number = measures.values["ended"].count
    truncated, repeated = 1 - measures.values["ended"].value, measures.values["repeated_4grams"].value
    message = (
        f"{round(truncated * number)} of {number} completions were cut off at max_new_tokens={max_new_tokens}; mean "
        f"length {measures.values['length'].value:.0f}; {repeated:.0%} of the 4-grams are repetitions"
    )
    if truncated > TRUNCATION_WARNING:
        remedy = "raise max_new_tokens" + (
            ""
            if measures.name == "teacher"
            else "; if it never ends its answers, train it on data or with seq_kd first"
        )
    elif repeated > repetition_threshold:
        remedy = "see drop_repetitive_completions, or start with a lower lmbda"
    else:
        remedy = ""
    out.add(f"Rollouts, {measures.name}", "warning" if remedy else "ok", message, remedy)
