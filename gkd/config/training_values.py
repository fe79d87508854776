"""Fields of the base classes: values that the libraries meet long after the start, or never, refused with the config.

A learning rate below zero is an optimizer's to refuse, after the models were loaded and measured; a number of steps
below one saves no checkpoint, an unknown sampling strategy is the random one, and nobody says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

from gkd.common.ranges import one_of, whole, within

# From 0 on, and finite: field, remedy.
_NUMBERS = {
    "learning_rate": "1e-5 is usual for all weights, 1e-4 for LoRA",
    "weight_decay": "0 is none",
    "adam_epsilon": "1e-8 is usual",
    "max_grad_norm": "0 does not clip",
    "neftune_noise_alpha": "leave it out for none",
}
_WHOLE = ("seed", "dataloader_num_workers", "dataset_num_proc", "pad_to_multiple_of")
_SAMPLING = ("random", "sequential", "group_by_length", "batch_rebalance")
_SEEDS = 2**32


def check_training_values(config: Any) -> None:
    """Refuse them.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    for name, hint in _NUMBERS.items():
        if getattr(config, name) is not None:
            within(name, getattr(config, name), 0, math.inf, hint)
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} is out of range [0, 1): 0.9 and 0.999 are usual")
    for name in _WHOLE:
        if getattr(config, name) is not None:
            whole(name, getattr(config, name), 0)
    if config.seed >= _SEEDS:
        raise ValueError(f"seed={config.seed} is out of range: use a whole number below {_SEEDS}")
    one_of("train_sampling_strategy", config.train_sampling_strategy, _SAMPLING)
    for name in ("log_level", "log_level_replica"):
        one_of(name, getattr(config, name), trainer_log_levels)
    for name in config.report_to:
        one_of("report_to", name, ("none", "all", *INTEGRATION_TO_CALLBACK))
    _check_when(config)


def _check_when(config: Any) -> None:
    """How often something is done, and what would never be."""
    for kind in ("logging", "save", "eval"):
        name, value = f"{kind}_steps", getattr(config, f"{kind}_steps")
        steps = getattr(config, f"{kind}_strategy") == "steps" and value is not None
        if steps and not 0 < value < math.inf:
            raise ValueError(
                f"{name}={value} should be above 0: a number of steps, or below 1 a share of the training; for none "
                f"set {kind}_strategy=no"
            )
    if config.load_best_model_at_end and config.eval_strategy == "no":
        raise ValueError(
            "load_best_model_at_end=True has no effect with eval_strategy=no, which finds no best one: set "
            "eval_strategy and save_strategy, or leave it out"
        )


def check_accelerator_config(config: Any) -> None:
    """Refuse a key that accelerate's dataclass lacks, before the base class builds it.

    Raises:
        ValueError: naming the key.
    """
    given = config.accelerator_config
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"accelerator_config={given!r} is no JSON: {error}") from error
    known = {field.name for field in dataclasses.fields(AcceleratorConfig)}
    for name in given if isinstance(given, dict) else ():
        one_of("accelerator_config", name, sorted(known))
