"""Fields about the guard against collapse."""

from __future__ import annotations

from typing import Any

from gkd.common.ranges import one_of, whole, within
from gkd.config.schedules import AUTO

GUARDS = ("off", "warn", "lower_lmbda", "rollback", "stop")
LOWERING = ("lower_lmbda", "rollback")
_NO_RATE = ("reduce_lr_on_plateau", "greedy")  # schedules whose rate is in their own state


def check_collapse(config: Any) -> None:
    """Refuse a guard that could not do what its field says, and settings without one.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    one_of("collapse_guard", config.collapse_guard, GUARDS)
    whole("collapse_window", config.collapse_window, 1)
    within("collapse_threshold", config.collapse_threshold, 0, 1, "0.5 is half of the way", above=True)
    defaults = {name: type(config).__dataclass_fields__[name].default for name in _SETTINGS}
    for text in (said for wrong, said in _rules(config, defaults) if wrong):
        raise ValueError(text)


_SETTINGS = ("collapse_window", "collapse_threshold")


def _rules(config: Any, defaults: dict[str, Any]) -> list[tuple[bool, str]]:
    guard, decides = config.collapse_guard, config.lmbda == AUTO
    given = f"collapse_guard={guard!r}"
    changed = {name: getattr(config, name) != default for name, default in defaults.items()}
    return [
        (
            guard != "off" and not config.student_writes,
            f"{given} has no effect with lmbda=0, where the student writes nothing: leave it out",
        ),
        (
            guard == "off" and changed["collapse_threshold"],
            f"collapse_threshold={config.collapse_threshold} has no effect with collapse_guard=off: set a guard, or "
            "leave it out",
        ),
        (
            guard == "off" and not decides and changed["collapse_window"],
            f"collapse_window={config.collapse_window} has no effect with collapse_guard=off: set a guard, or leave "
            "it out",
        ),
        (
            guard == "rollback" and config.save_strategy == "no",
            f"{given} needs checkpoints to go back to: set save_strategy and save_steps, or another guard",
        ),
        (
            guard == "rollback" and config.save_only_model,
            f"{given} does not go with save_only_model=True, whose checkpoints hold no optimizer to go on with",
        ),
        (
            guard == "rollback" and config.lr_scheduler_type in _NO_RATE,
            f"{given} halves the learning rate, which lr_scheduler_type={config.lr_scheduler_type} keeps for itself: "
            "take another schedule or guard",
        ),
        (
            config.rollout_staleness != 0 and (guard in LOWERING or decides),
            f"{'lmbda=auto' if decides else given} changes the student's share between steps, and with "
            "rollout_staleness=1 the next step's is asked for ahead: set rollout_staleness=0",
        ),
        (
            decides and config.mixing == "batch",
            "lmbda=auto does not go with mixing='batch', where whole steps have no rollout to decide by: set 'sample'",
        ),
    ]
