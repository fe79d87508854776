"""Values that the base classes take without a look and that would fail much later. Level 1: `gkd.config` calls this."""

from __future__ import annotations

import json
from typing import Any

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_FORM = """'{"name": "value"}'"""
_DICTS = ("teacher_model_init_kwargs", "model_init_kwargs", "generation_kwargs", "teacher_adapters")


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
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}={value!r} is no JSON ({error}): write for example {_FORM}") from error
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name}={value!r} is no dictionary: write for example {_FORM}")


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
