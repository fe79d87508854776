"""The settings that a model card shows: the core of the method, and everything that differs from its default."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import os
from collections.abc import Mapping
from typing import Any

from gkd.common.text import shorten
from gkd.loss import DIVERGENCES
from gkd.report.repo import Repo

CORE = (
    "lmbda",
    "divergence",
    "temperature",
    "max_new_tokens",
    "max_length",
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "seed",
)
# What says where a run stood and where its record went, or is said elsewhere on the card.
ELSEWHERE = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "run_name",
    "project",
    "report_to",
    "push_to_hub",
    "disable_tqdm",
    "local_rank",
    "use_cpu",
    "debug",
    "do_train",
    "do_eval",
    "do_predict",
    "accelerator_config",
    "parallelism_config",
    "dataloader_pin_memory",
    "teacher_model_name_or_path",
    "teacher_adapter_name_or_path",
    "teacher_adapters",
    "teachers",
}
# What the configuration or the trainer fills in, whatever the user says.
FILLED_IN = {
    "remove_unused_columns",
    "dataset_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "pad_to_multiple_of",
}
_PREFIXES, _SUFFIXES = ("hub_", "trackio_"), ("_url", "_dir", "_proxy")
_LONGEST = 200  # characters of a value


def settings_for_card(args: Any) -> dict[str, Any]:
    """Field -> value, ready for a table: CORE with the length of the training and the divergence's own parameters,
    then every other field that is not at its default."""
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    first = [*CORE, length, *inspect.signature(DIVERGENCES[args.divergence]).parameters]
    without = ELSEWHERE | FILLED_IN | {"max_steps", "num_train_epochs"}
    rest = [
        one.name
        for one in dataclasses.fields(args)
        if one.name not in without
        and not one.name.startswith(_PREFIXES)
        and not one.name.endswith(_SUFFIXES)
        and not _is_default(args, one)
    ]
    values = {name: _plain(getattr(args, name)) for name in dict.fromkeys((*first, *rest))}
    return {name: shorten(value, _LONGEST) if isinstance(value, str) else value for name, value in values.items()}


def _is_default(args: Any, one: dataclasses.Field[Any]) -> bool:
    value = getattr(args, one.name, None)
    if one.name == "data_seed":
        return bool(value == args.seed)
    default = one.default
    if one.default_factory is not dataclasses.MISSING:
        default = one.default_factory()
    value, default = _plain(value), _plain(default)
    return bool(value == default) or (value in ({}, []) and default in (None, {}, [], ""))


def _plain(value: Any) -> Any:
    """Without enumerations, empty entries and folders of this machine."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        is_path = os.path.isabs(value) or os.path.exists(value)
        return Repo(value, on_hub=False).display_name if is_path else value
    return value if value is None or isinstance(value, bool | int | float) else str(value)
