"""Fields about sample completions in the log."""

from __future__ import annotations

from typing import Any

from gkd.common.ranges import whole

COMPLETIONS_TO_PRINT = 4


def check_logging(config: Any) -> None:
    """Refuse a field about sample completions that is out of range or would have no effect.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    for name, fine in (("log_completions_steps", None), ("num_completions_to_print", COMPLETIONS_TO_PRINT)):
        value = getattr(config, name)
        if value == fine:
            continue
        if not config.log_completions:
            raise ValueError(
                f"{name}={value!r} has no effect with log_completions=False: set log_completions=True, or leave it out"
            )
        whole(name, value, 1)
