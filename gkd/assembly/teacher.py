"""Which kind of teacher the fields ask for, made ready to score."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from gkd.assembly.scores import with_scores
from gkd.config.fields import GKDConfig
from gkd.models.adapters import load_adapter
from gkd.models.shared_weights import base_of_student, is_new, second_model
from gkd.servers.checks import Server
from gkd.teachers import TEACHERS
from gkd.teachers.base import Teacher
from gkd.teachers.routed import RoutedTeacher
from gkd.teachers.shared import SharedTeacher

logger = logging.getLogger(__name__)


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
    if server is not None:
        vocabulary = int(student.config.get_text_config().vocab_size)
        return TEACHERS["server"](server.client, server.served, args.teacher_top_k, vocabulary)

    if args.teacher_names:
        return RoutedTeacher(_several(args, teacher_model, accelerator))

    def live(model: Any) -> Any:
        if args.share_base_model:
            return TEACHERS["shared"](model, accelerator)
        return TEACHERS["local"](model, accelerator, args.teacher_placement)

    if args.teacher_scores_dir is None:
        return live(teacher_model)
    return with_scores(args, teacher_model, accelerator, live)


def shared_base(args: GKDConfig, teacher_model: Any, student: nn.Module) -> Any:
    """The teacher's model; under `share_base_model` a second one over the student's base, with the teacher's adapter.

    Raises:
        ValueError: the student's training changes its base, or the adapter does not fit it.
    """
    if not args.share_base_model:
        return teacher_model
    base = base_of_student(student)
    learns = args.ce_weight > 0 or (args.seq_kd and args.seq_kd_loss == "nll")
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


def frozen_models(teacher: Teacher) -> list[Callable[[], Any]]:
    """What gives the model of each teacher: one, or as many as there are."""
    if isinstance(teacher, RoutedTeacher):
        return [partial(getattr, one, "model") for one in teacher.teachers]
    return [lambda: teacher.model]
