"""Which kind of teacher the fields ask for, made ready to score."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import nn

from gkd.assembly.scores import with_scores
from gkd.assembly.several import over_base
from gkd.config.fields import GKDConfig
from gkd.models.adapters import load_adapter
from gkd.models.facts import head_size, model_name
from gkd.models.shared_weights import base_of_student, is_new, same_model, with_own_adapter
from gkd.servers.checks import Server
from gkd.teachers.average import AverageTeacher
from gkd.teachers.base import Teacher
from gkd.teachers.live import LiveTeacher
from gkd.teachers.local import LocalTeacher
from gkd.teachers.none import NoTeacher
from gkd.teachers.routed import RoutedTeacher
from gkd.teachers.server import ServerTeacher
from gkd.teachers.shared import SharedTeacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherOrder:
    """All that a run has for a teacher.

    Attributes:
        args: the fields.
        model: the teacher's, as `shared_base` gave it (of several, their base); None when it is elsewhere.
        student: the unwrapped student, for a teacher that shares something with it.
        accelerator: where the student trains, and how it is sharded.
        server: the teacher's, or None.
        lent: the model stands on weights that other teachers stand on, too.
        alone: it is the only teacher.
    """

    args: GKDConfig
    model: Any
    student: Any
    accelerator: Accelerator
    server: Server | None
    lent: bool = False
    alone: bool = True


def _on_server(order: TeacherOrder) -> Teacher:
    assert order.server is not None
    assert order.args.teacher_top_k is not None
    vocabulary = head_size(order.student) if order.args.teacher_tokenizer_alignment is None else None
    return ServerTeacher(order.server.client, order.server.served, order.args.teacher_top_k, vocabulary)


def _routed(order: TeacherOrder) -> Teacher:
    assert isinstance(order.args.teacher_adapters, dict)
    models = over_base(order.model, order.args.teacher_adapters, "teacher_adapters")
    return RoutedTeacher({name: _shared(replace(order, model=model)) for name, model in models.items()})


def _shared(order: TeacherOrder) -> Teacher:
    return _kept(order, lambda model: SharedTeacher(model, order.accelerator))


def _self(order: TeacherOrder) -> Teacher:
    args = order.args
    if args.teacher_follows and args.teacher_writes:
        logger.info(
            "self_teacher=%r writes each sequence anew, with its present weights: none are kept", args.self_teacher
        )
    if args.self_teacher == "live":
        return LiveTeacher(order.model, order.accelerator)
    if args.self_teacher == "ema":
        return AverageTeacher(order.model, order.student, order.accelerator, args.self_teacher_decay)
    return _shared(order)


def _local(order: TeacherOrder) -> Teacher:
    return _kept(order, lambda model: _local_of(order, model))


def _local_of(order: TeacherOrder, model: Any) -> LocalTeacher:
    return LocalTeacher(model, order.accelerator, order.args.teacher_placement, alone=order.alone)


def _kept(order: TeacherOrder, live: Callable[[Any], Any]) -> Teacher:
    """With what it says on disk, if there is a place for it."""
    if order.args.teacher_scores_dir is None:
        teacher: Teacher = live(order.model)
        return teacher
    return with_scores(order.args, order.model, order.accelerator, live)


# The field that asks for a kind of teacher, and what makes it: the first one that is set. Without any it is a model
# of its own in this process.
TEACHERS: dict[str, Callable[[TeacherOrder], Teacher]] = {
    "teacher_server_url": _on_server,
    "teacher_adapters": _routed,
    "share_base_model": _shared,
    "self_teacher": _self,
}


def make_teacher(order: TeacherOrder) -> Teacher:
    """The teacher: on its server, or the model in this process; which kind is said by the `teacher_*` fields."""
    if order.lent:
        return _shared(order)
    make = next((make for field, make in TEACHERS.items() if getattr(order.args, field)), None)
    if make is None and order.model is None:
        assert not order.args.needs_teacher
        return NoTeacher()
    return (make or _local)(order)


def shared_base(args: GKDConfig, teacher_model: Any, student: nn.Module) -> Any:
    """The teacher's model; where it shares the student's weights, a second one over them, with an adapter of the
    teacher's own where it has one.

    Raises:
        ValueError: the student's training changes what is shared, or the adapter does not fit it.
    """
    if args.self_teacher == "live":
        return same_model(student)
    if args.self_teacher == "ema":
        return with_own_adapter(student)
    if not args.shares_weights:
        return teacher_model
    asked = "share_base_model=True" if args.self_teacher is None else f"self_teacher={args.self_teacher!r}"
    base, name = base_of_student(student, asked), args.teacher_adapter_name_or_path
    return base if name is None else load_adapter(base, name, "teacher_adapter_name_or_path", shared=True)


def warn_of_one_model(args: GKDConfig, student: nn.Module, rows: Any) -> None:
    """Say so where student and teacher are one model that reads the same prompts: nothing would be learnt.

    Args:
        rows: the prepared train rows; with prompts of the teacher's own, the two differ all the same.
    """
    learns = args.ce_weight > 0 or args.reward_weight > 0 or (args.teacher_writes and args.seq_kd_loss == "nll")
    if learns or not (args.shares_weights or _is_named_twice(args, student)) or _teacher_reads_otherwise(rows):
        return
    if not args.shares_weights:
        logger.warning(
            "student and teacher are the same model, %s, so divergence and gradient are 0 and nothing is learnt: name "
            "another one with teacher_model_name_or_path, or train on something beside it (ce_weight)",
            args.teacher_model_name_or_path,
        )
        return
    remedy = "give the teacher a prompt of its own (the column teacher_system or teacher_prompt)"
    if args.teacher_follows:
        logger.warning(
            "self_teacher=%r: student and teacher are one model and read the same prompts, so divergence and gradient "
            "are 0: %s",
            args.self_teacher,
            remedy,
        )
    elif args.teacher_adapter_name_or_path is None and not args.teacher_names and is_new(student):
        logger.warning(
            "the student's adapter is new, so student and teacher are one model, and divergence and gradient are 0: "
            "give the teacher an adapter (teacher_adapter_name_or_path), %s, or train on something beside it "
            "(ce_weight)",
            remedy,
        )


def _is_named_twice(args: GKDConfig, student: nn.Module) -> bool:
    """Whether the teacher that is loaded by name has the student's very weights, as they are before the training."""
    name, own, kwargs = args.teacher_model_name_or_path, model_name(student), args.teacher_model_init_kwargs or {}
    if name is None or own is None or args.teacher_names:
        return False
    if os.path.realpath(own) != os.path.realpath(name) if os.path.isdir(own) else own != name:
        return False
    return not (
        args.teacher_adapter_name_or_path is not None
        or (isinstance(student, PeftModel) and not is_new(student))
        or isinstance(kwargs, str)
        or {"revision", "quantization_config", "subfolder"} & set(kwargs)  # loaded in another way
        or getattr(student, "is_quantized", False)
        or not args.disable_dropout
    )


def _teacher_reads_otherwise(rows: Any) -> bool:
    """Whether some prepared row has a prompt of the teacher's own; foreign rows are not looked into."""
    if not isinstance(rows, Dataset):
        return False
    columns = [name for name in ("teacher_context", "teacher_prompt_ids") if name in rows.column_names]
    tables = rows.select_columns(columns).with_format("arrow").iter(1000) if columns else ()
    return any(pc.max(pc.list_value_length(table.column(name))).as_py() for table in tables for name in columns)
