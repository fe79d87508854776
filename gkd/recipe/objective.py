"""`objective`: a word for fields that go together. "sft" trains on the data's answers, and asks no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gkd.config.fields import GKDConfig
from gkd.recipe.set_aside import plain

OBJECTIVES = ("distill", "sft")
SFT: dict[str, Any] = {"lmbda": 0.0, "seq_kd": False, "ce_weight": 1.0}


def fields_of(objective: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the word stands for; {} for the distillation, which the fields themselves describe.

    Args:
        objective: the word. given: what flags and YAML say.

    Raises:
        ValueError: a field is given that says something else.
    """
    if objective != "sft":
        return {}
    for name, value in SFT.items():
        if name in given and plain(given[name]) != plain(value):
            meant = ", ".join(f"{field}={one}" for field, one in SFT.items())
            raise ValueError(f"{name}={given[name]} does not go with objective='sft' ({meant}): leave one of them out")
    return dict(SFT)


def leave_teacher_out(args: GKDConfig, measures: bool) -> None:
    """Load no teacher that nothing asks: neither the training, nor an evaluation.

    Args:
        args: changed. measures: the run is evaluated before and after.
    """
    if not (args.needs_teacher or measures or args.evaluates_along):
        args.teacher_model_name_or_path, args.teacher_model_init_kwargs = None, None
        args.teacher_adapter_name_or_path, args.teacher_placement = None, "same"
