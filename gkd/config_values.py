"""Ranges, choices, and values that would be ignored or fail much later. Level 1: `gkd.config` calls this."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from gkd.config_servers import ROLLOUT_BACKENDS
from gkd.field_types import shown
from gkd.redact import redact_value
from gkd.source import MIXINGS

_OVERLONG_PROMPT = ("drop", "keep_start", "keep_end")
_OVERLONG_ROW = ("cut", "drop")
_TURNS = ("last", "all")
_UNANSWERED = ("cut", "drop")
_REDUCTIONS = ("token", "sequence")
_SEQ_KD_LOSSES = ("divergence", "nll")
_TAILS = ("bucket", "renormalize", "renormalize_both", "ignore")

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

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_FORM = """'{"name": "value"}'"""
_DICTS = (
    "teacher_model_init_kwargs",
    "model_init_kwargs",
    "generation_kwargs",
    "teacher_adapters",
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
            raise ValueError(f"{name}={shown(value)} is no dictionary: write for example {_FORM}")
        if value is not None and not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name}={shown(value)}: its keys should be texts, for example {_FORM}")
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
    if config.max_steps <= 0 and config.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs={config.num_train_epochs} should be above 0, or set max_steps")


def check_values(config: Any) -> None:
    """Refuse a value out of range, an unknown choice, and an option that this trainer cannot honour.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    _check_ranges(config)
    _check_choices(config)
    _check_ineffective(config)
    _check_schedule(config)


def _check_ranges(config: Any) -> None:
    _within("lmbda", config.lmbda, 0, 1, "0 trains on the data only, 1 on rollouts only")
    _within("ce_weight", config.ce_weight, 0, 1, "0 is the divergence only, 1 is cross-entropy only")
    _within("top_p", config.top_p, 0, 1, "1 turns it off", low_open=True)
    _within("temperature", config.temperature, 0, math.inf, "0 is greedy, the paper samples at 1")
    _within("loss_temperature", config.loss_temperature, 0, math.inf, "1 is the plain softmax", low_open=True)
    if config.teacher_loss_temperature is not None:
        _within("teacher_loss_temperature", config.teacher_loss_temperature, 0, math.inf, "1", low_open=True)
    _within("repetition_penalty", config.repetition_penalty, 0, math.inf, "1 turns it off", low_open=True)
    if config.teacher_temperature is not None:
        _within("teacher_temperature", config.teacher_temperature, 0, math.inf, "0 is greedy, None is temperature")
    _within("repetition_threshold", config.repetition_threshold, 0, 1, "1 calls nothing repetitive")
    if config.min_p is not None:
        _within("min_p", config.min_p, 0, 1, "None turns it off")
    _whole("max_new_tokens", config.max_new_tokens, 1)
    _whole("top_k", config.top_k, 0)
    _whole("max_nonfinite_steps", config.max_nonfinite_steps, 0)
    for name in ("teacher_top_k", "loss_chunk_size", "rollout_batch_size", "max_prompt_length", "max_length"):
        if getattr(config, name) is not None:
            _whole(name, getattr(config, name), 1)


def _check_choices(config: Any) -> None:
    choices: dict[str, tuple[str, ...]] = {
        "mixing": MIXINGS,
        "loss_reduction": _REDUCTIONS,
        "seq_kd_loss": _SEQ_KD_LOSSES,
        "top_k_tail": _TAILS,
        "rollout_backend": ROLLOUT_BACKENDS,
        "overlong_prompt": _OVERLONG_PROMPT,
        "overlong_row": _OVERLONG_ROW,
        "unanswered_rows": _UNANSWERED,
        "assistant_turns": _TURNS,
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown: use one of {', '.join(known)}")


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
    if config.teacher_top_k is None and config.top_k_tail != "bucket":
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
                f"lr_scheduler_kwargs={shown(given)}: {argument!r} has no effect with "
                f"lr_scheduler_type={name.value!r}: {known}"
            )


def _within(name: str, value: float, low: float, high: float, hint: str, low_open: bool = False) -> None:
    inside = (low < value if low_open else low <= value) and value <= high and not math.isnan(value)
    if not inside or math.isinf(value):
        bracket = "(" if low_open else "["
        raise ValueError(f"{name}={value} is out of range {bracket}{low}, {high}]: {hint}")


def _whole(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}")
