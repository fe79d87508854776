"""Single fields: sizes and choices that no settings object holds, and options that this trainer cannot honour."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from gkd.common.ranges import one_of, whole, within
from gkd.common.redact import redact_value
from gkd.config.field_types import describe
from gkd.rollouts.base import BACKENDS
from gkd.rollouts.batch_size import check_batch_size

# SFTConfig fields that have no effect here: (field, the value that is fine, what to do instead).
_INEFFECTIVE = (
    ("packing", False, "rows are sorted by length and trimmed per micro-batch instead"),
    ("padding_free", False, "rows are sorted by length and trimmed per micro-batch instead"),
    ("eval_packing", None, "leave it out"),
    ("packing_strategy", "bfd", "leave it out"),
    ("dataset_text_field", "text", "rename the column to `text`"),
    ("assistant_only_loss", False, "use assistant_turns='all' to train on every assistant turn"),
    ("loss_type", "nll", "name the divergence with `divergence`, mix in cross-entropy with `ce_weight`"),
    ("label_smoothing_factor", 0.0, "use loss_temperature or a divergence instead"),
    ("truncation_mode", "keep_start", "use overlong_prompt and overlong_row"),
    ("average_tokens_across_devices", True, "the loss is always the mean over the targets of all ranks"),
)

INEFFECTIVE = tuple(name for name, _, _ in _INEFFECTIVE)

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_FORM = """'{"name": "value"}'"""
_DICTS = (
    "teacher_model_init_kwargs",
    "model_init_kwargs",
    "generation_kwargs",
    "teacher_adapters",
    "teachers",
    "lr_scheduler_kwargs",
    "dataset_kwargs",
)
# What the Trainer itself passes to a schedule.
_OF_THE_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def check_dicts(config: Any) -> None:
    """Refuse a field for a dictionary that holds something else, before the base class reads its JSON.

    Raises:
        ValueError: naming the field, the value and the form.
    """
    for name in _DICTS:
        value = getattr(config, name, None)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{name}={redact_value(repr(value))} is no JSON ({error}): write for example {_FORM}"
                ) from error
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name}={describe(value)} is no dictionary: write for example {_FORM}")
        if value is not None and not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name}={describe(value)}: its keys should be texts, for example {_FORM}")
        if isinstance(getattr(config, name, None), str):
            setattr(config, name, None if value is None else json.dumps(value))  # without spaces around it


def check_counts(config: Any) -> None:
    """Refuse sizes of batches below one.

    Raises:
        ValueError: naming the field and the value.
    """
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name}={value} should be 1 or more")
    if config.max_steps <= 0 and not 0 < config.num_train_epochs < math.inf:
        raise ValueError(f"num_train_epochs={config.num_train_epochs} should be above 0, or set max_steps")
    if config.max_steps == 0:
        raise ValueError("max_steps=0 trains nothing: leave it out to train for num_train_epochs")


def check_values(config: Any) -> None:
    """Refuse a value out of range and an unknown choice, of the fields that no settings object checks.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    within("ce_weight", config.ce_weight, 0, 1, "0 is the divergence only, 1 is cross-entropy only")
    whole("max_nonfinite_steps", config.max_nonfinite_steps, 0)
    check_batch_size(config.rollout_batch_size)
    one_of("loss_reduction", config.loss_reduction, ("token", "sequence"))
    one_of("seq_kd_loss", config.seq_kd_loss, ("divergence", "nll"))
    one_of("rollout_backend", config.rollout_backend, BACKENDS)
    for name, choice in (("rollout_server", "auto"), ("teacher_server", "auto"), ("rollout_server_sharing", "sleep")):
        if getattr(config, name) is not None:
            one_of(name, getattr(config, name), (choice,))


def check_options(config: Any) -> None:
    """Refuse options that would have no effect, or that this trainer cannot honour.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    _check_ineffective(config)
    _check_schedule(config)


def _check_ineffective(config: Any) -> None:
    for name, fine, remedy in _INEFFECTIVE:
        value = getattr(config, name, fine)
        # transformers itself turns average_tokens_across_devices off when there is one process
        if value != fine and not (name == "average_tokens_across_devices" and config.world_size == 1):
            raise ValueError(f"{name}={value!r} has no effect in GKDTrainer: {remedy}")

    if config.completion_only_loss is False:
        raise ValueError(
            "completion_only_loss=False is not supported: only completions are trained on; leave it out, or, to train "
            "on whole texts, pass rows of `text`"
        )
    if others := sorted(set(config.dataset_kwargs or ()) - {"skip_prepare_dataset"}):
        raise ValueError(
            f"dataset_kwargs: {', '.join(others)} has no effect in GKDTrainer, which prepares all rows itself: "
            "leave it out, and change the rows before they are passed, or in a formatting_func"
        )
    if not config.cuts_to_top_k and config.top_k_tail != "bucket":
        raise ValueError(
            f"top_k_tail={config.top_k_tail!r} has no effect without teacher_top_k: set that, or leave it out"
        )
    if config.ce_weight == 0 and config.ce_on_student_tokens:
        raise ValueError("ce_on_student_tokens=True has no effect with ce_weight=0: raise ce_weight, or leave it out")
    for name, fine in (("teacher_temperature", None), ("seq_kd_loss", "divergence")):
        if not config.seq_kd and getattr(config, name) != fine:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no effect with seq_kd=False, where the teacher writes no "
                f"sequences: set seq_kd=True, or leave it out"
            )


def _check_schedule(config: Any) -> None:
    """Arguments that the chosen schedule does not take; the Trainer would stop at them, or never look at them."""
    given = config.lr_scheduler_kwargs or {}
    name = SchedulerType(config.lr_scheduler_type)
    takes = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters) - set(_OF_THE_TRAINER)
    if name in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        takes = set()  # the Trainer passes nothing on
    for argument in given:
        if argument not in takes:
            known = f"it takes {', '.join(sorted(takes))}" if takes else "it takes none"
            raise ValueError(
                f"lr_scheduler_kwargs={describe(given)}: {argument!r} has no effect with "
                f"lr_scheduler_type={name.value!r}: {known}"
            )
