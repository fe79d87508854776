"""Flags about the student's adapter and its quantization that would have no effect, since neither is asked for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_OF_LORA = ("use_rslora", "use_dora")
_OF_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


def check_effective(said: Collection[str], model: Any) -> None:
    """Refuse them where the user says them; a recipe's own values may wait for `--use_peft`.

    Args:
        said: the fields that the command line or YAML gives.
        model: TRL's `ModelConfig`.

    Raises:
        ValueError: naming the field, its value and the one that it needs.
    """
    for name in said:
        needs = "use_peft" if name.startswith("lora_") or name in _OF_LORA else None
        needs = "load_in_4bit" if name in _OF_4BIT else needs
        if needs is not None and not getattr(model, needs) and getattr(model, name):
            raise ValueError(
                f"{name}={getattr(model, name)} has no effect with {needs}=False: add --{needs}, or leave it out"
            )
