"""Which kind of teacher the fields ask for, made ready to score."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from gkd.assembly.scores import with_scores
from gkd.config.fields import GKDConfig
from gkd.models.adapters import load_adapter
from gkd.models.facts import head_size
from gkd.models.shared_weights import base_of_student, is_new, second_model
from gkd.servers.checks import Server
from gkd.teachers.base import Teacher
from gkd.teachers.local import LocalTeacher
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
    """

    args: GKDConfig
    model: Any
    student: Any
    accelerator: Accelerator
    server: Server | None


def _on_server(order: TeacherOrder) -> Teacher:
    assert order.server is not None
    assert order.args.teacher_top_k is not None
    vocabulary = head_size(order.student)
    return ServerTeacher(order.server.client, order.server.served, order.args.teacher_top_k, vocabulary)


def _routed(order: TeacherOrder) -> Teacher:
    return RoutedTeacher(_several(order.args, order.model, order.accelerator))


def _shared(order: TeacherOrder) -> Teacher:
    return _kept(order, lambda model: SharedTeacher(model, order.accelerator))


def _local(order: TeacherOrder) -> Teacher:
    return _kept(order, lambda model: LocalTeacher(model, order.accelerator, order.args.teacher_placement))


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
}


def make_teacher(
    args: GKDConfig, teacher_model: Any, student: Any, accelerator: Accelerator, server: Server | None
) -> Teacher:
    """The teacher: on its server, or the model in this process.

    Args:
        args: its `teacher_*` fields say which kind.
        teacher_model: the model, as `shared_base` gave it (of several, their base); None when it is elsewhere.
        student: the unwrapped student, for a teacher that shares something with it.
        accelerator: where the student trains, and how it is sharded.
        server: the teacher's, or None.
    """
    make = next((make for field, make in TEACHERS.items() if getattr(args, field)), _local)
    return make(TeacherOrder(args, teacher_model, student, accelerator, server))


def shared_base(args: GKDConfig, teacher_model: Any, student: nn.Module) -> Any:
    """The teacher's model; under `share_base_model` a second one over the student's base, with the teacher's adapter.

    Raises:
        ValueError: the student's training changes its base, or the adapter does not fit it.
    """
    if not args.share_base_model:
        return teacher_model
    base = base_of_student(student)
    learns = args.ce_weight > 0 or (args.teacher_writes and args.seq_kd_loss == "nll")
    if not learns and args.teacher_adapter_name_or_path is None and not args.teacher_names and is_new(student):
        logger.warning(
            "the student's adapter is new, so student and teacher are one model, and divergence and gradient are 0: "
            "give the teacher an adapter (teacher_adapter_name_or_path), or train on something beside it (ce_weight)"
        )
    name = args.teacher_adapter_name_or_path
    return base if name is None else load_adapter(base, name, "teacher_adapter_name_or_path", shared=True)


def _several(args: GKDConfig, base: Any, accelerator: Accelerator) -> dict[str, SharedTeacher]:
    """A teacher for each of `teacher_adapters`, all over the weights of `base`."""
    if isinstance(base, PeftModel):
        raise ValueError("teacher_adapters: teacher_model has an adapter already; pass its base model")
    assert isinstance(args.teacher_adapters, dict)
    models = {
        name: second_model(base)
        if adapter is None
        else load_adapter(second_model(base), adapter, f"teacher_adapters[{name!r}]", shared=True)
        for name, adapter in args.teacher_adapters.items()
    }
    return {name: SharedTeacher(model, accelerator) for name, model in models.items()}
