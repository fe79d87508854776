"""What a distillation is made of before there is a Trainer: checked fields, tokenizer, teacher, rows, collator.

Training and `gkd precompute` both begin here, so that what is written beforehand is what the training asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gkd.assembly.launch_checks import check_launch
from gkd.assembly.models import resolve_config, resolve_tokenizer
from gkd.assembly.own_servers import with_own_teacher
from gkd.assembly.reading import reading_of_teachers
from gkd.assembly.rollouts import encoding_options
from gkd.assembly.rows import prepare_rows
from gkd.assembly.several import resolve_teachers
from gkd.assembly.student import check_named
from gkd.config.fields import GKDConfig
from gkd.data.teacher_rows import TeacherReading
from gkd.models.zero import join_ranks_on_cpu


@dataclass(frozen=True)
class Given:
    """What a caller brings beside the fields; each is as in `gkd.GKDTrainer`.

    `student` and `teacher` are models or names; no `tokenizer` takes the student's own, and no `teacher_tokenizer`
    the one by the teacher's name.
    """

    student: Any
    teacher: Any = None
    tokenizer: Any = None
    train: Dataset | None = None
    evaluation: Dataset | dict[str, Dataset] | None = None
    collator: Any = None
    formatting_func: Callable[..., Any] | None = None
    teacher_view: Callable[[dict[str, Any]], Any] | None = None
    teacher_tokenizer: Any = None


@dataclass(frozen=True)
class Materials:
    """All of it, ready.

    `student` is as it was given; `config` is its config, None where it was not looked at. `teachers` are not placed
    yet: models by their names in the field `teachers`, under None the one of a run that has one; None on a server, or
    over the student's base. `encoding` is what the rows were prepared with beside the fields. `teacher_tokenizer` is
    the one that was given.
    """

    args: GKDConfig
    student: Any
    config: Any
    teachers: dict[str | None, Any]
    tokenizer: PreTrainedTokenizerBase
    encoding: dict[str, Any]
    train: Dataset | None
    evaluation: Any
    collator: Any
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    def tokenizer_of(self, number: int) -> PreTrainedTokenizerBase | None:
        """The one that was given, or whose template the teacher of that number reads."""
        own = self.reading.template(number)
        return self.teacher_tokenizer if own is None else own.tokenizer

    @property
    def reading(self) -> TeacherReading:
        """How its teachers read the rows."""
        found: TeacherReading = self.encoding["reading"]
        return found

    @property
    def end_map(self) -> tuple[int, int] | None:
        """The ids that end a turn of the student's and of the teacher's, where they are not the same."""
        return self.reading.end_map


def materials(args: GKDConfig, given: Given, config: Any = None) -> Materials:
    """Teacher, tokenizer and rows. The student is not loaded. Ranks that DeepSpeed joins have met from here on.

    Args:
        args: the fields.
        given: the rest.
        config: the student's, to be handed on.

    Raises:
        ValueError: what `resolve_teachers`, `resolve_tokenizer` or `prepare_rows` refuse.
    """
    if args.deepspeed:
        join_ranks_on_cpu()
    args = with_own_teacher(args, given.teacher)
    if args.teacher_server_url is not None and isinstance(given.teacher, str):
        given = replace(given, teacher=None)
    student = given.student
    teachers = resolve_teachers(student, given.teacher, args)
    tokenizer = resolve_tokenizer(given.tokenizer, student, args)
    reading = reading_of_teachers(
        args, tokenizer, student, teachers, view=given.teacher_view, teacher_tokenizer=given.teacher_tokenizer
    )
    encoding = encoding_options(student, tokenizer, args, loading_options(args), reading=reading)
    train, evaluation, collator = prepare_rows(
        args,
        tokenizer,
        encoding,
        train=given.train,
        evaluation=given.evaluation,
        formatting_func=given.formatting_func,
        collator=given.collator,
    )
    return Materials(
        args=args,
        student=student,
        config=config,
        teachers=teachers,
        tokenizer=tokenizer,
        encoding=encoding,
        train=train,
        evaluation=evaluation,
        collator=collator,
        teacher_tokenizer=given.teacher_tokenizer,
    )


def training_materials(args: Any, given: Given, quantization_config: Any = None) -> Materials:
    """The same for a training, whose launch and student are checked first.

    Args:
        args: a `GKDConfig`; None takes the defaults.
        given: the rest.
        quantization_config: with which a student that is given by name is loaded.

    Raises:
        ValueError, TypeError: what `resolve_config`, `check_launch` or `check_named` refuse, too.
    """
    if given.student is None:
        raise ValueError("model is missing: pass the student, a model or a name")
    args = resolve_config(args, given.student, quantization_config)
    check_launch(args)
    return materials(args, given, check_named(given.student, args))


def loading_options(args: GKDConfig) -> dict[str, Any]:
    """What a student that is given by name is looked up with: `revision`, `trust_remote_code` and the rest."""
    kwargs = args.model_init_kwargs or {}
    assert not isinstance(kwargs, str)  # TrainingArguments has parsed it
    return {"trust_remote_code": args.trust_remote_code, **kwargs}
