"""The models of `teachers`: each as a run's one teacher would be loaded, and what stands on one base loaded once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft import PeftModel

from gkd.assembly.models import resolve_teacher
from gkd.config.fields import GKDConfig
from gkd.config.several import of_entry
from gkd.models.adapters import load_adapter
from gkd.models.shared_weights import second_model


def resolve_teachers(student: Any, teacher: Any, args: GKDConfig) -> dict[str | None, Any]:
    """The model of each teacher, by its name in `teachers`; under None that of a run's one teacher. None for one on a
    server, or on the student's base.

    Args:
        student: a model, or its name.
        teacher: a model or a name that was given beside the fields; those without a model of their own stand on it.

    Raises:
        ValueError: what `resolve_teacher` refuses, told of the teacher; or a model that none of them stands on.
    """
    if args.teachers is None:
        return {None: resolve_teacher(student, teacher, args)}
    on_base, each = args.teachers_on_base, args.each_teacher
    if teacher is not None and not on_base:
        raise ValueError(
            "teacher_model does not go with args.teachers, all of which have a model or a server of their own: leave "
            "it out, or give one of them only an adapter"
        )
    found: dict[str | None, Any] = {}
    if lends_base(args):
        base = copy.copy(args)
        base.teachers, base.teacher_scores_dir = None, None  # the base says nothing itself
        adapters = {name: each[name].teacher_adapter_name_or_path for name in on_base}
        found.update(over_base(resolve_teacher(student, teacher, base), adapters, "teachers"))
    for name, one in each.items():
        if name not in found:
            with of_entry(name):
                found[name] = resolve_teacher(student, teacher if name in on_base else None, one)
    return {name: found[name] for name in each}


def lends_base(args: GKDConfig) -> bool:
    """Whether several of `teachers` stand on one model that is nobody else's."""
    return not args.share_base_model and len(args.teachers_on_base) > 1


def over_base(base: Any, adapters: Mapping[str, str | None], field: str) -> dict[str, Any]:
    """A model for each of the adapters, all over the weights of `base`; None is the base as it is.

    Raises:
        ValueError: the base has an adapter, or an adapter does not fit it.
    """
    if isinstance(base, PeftModel):
        raise ValueError(f"{field}: teacher_model has an adapter already; pass its base model")
    return {
        name: second_model(base)
        if adapter is None
        else load_adapter(second_model(base), adapter, f"{field}[{name!r}]", shared=True)
        for name, adapter in adapters.items()
    }
