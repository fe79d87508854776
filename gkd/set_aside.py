"""A recipe's values that only go with another one of its values go when that one is changed.

A recipe says `log_completions` and how often, or `divergence` and its `beta`. Whoever switches the first off, or takes
another divergence, on the command line or in YAML, does not mean the second any longer: as a default it should not
stand in the way. A value that the user gives is never set aside; it is refused where it has no effect.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

GO_WITH = {
    "log_completions": ("log_completions_steps", "num_completions_to_print"),
    "seq_kd": ("teacher_temperature", "seq_kd_loss"),
    "divergence": ("beta", "skew_lambda", "ab_alpha", "ab_beta", "akl_mu"),
    "evaluate_before_and_after": ("lm_eval_tasks", "lm_eval_limit"),
}
_YES, _NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")  # as the parser reads a switch


def set_aside(defaults: Mapping[str, Any], own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's defaults without those that go with a value which was changed.

    Args:
        defaults: of the recipe.
        own: the fields' own defaults.
        given: what flags and YAML give, as texts or as values.
    """
    kept = dict(defaults)
    for leader, followers in GO_WITH.items():
        before = defaults.get(leader, own.get(leader))
        if leader not in given or _plain(given[leader]) == _plain(before):
            continue
        for name in followers:
            if name in kept and name not in given:
                logger.info("%s=%s: the recipe's %s=%s is set aside", leader, given[leader], name, kept.pop(name))
    return kept


def flag_values(argv: list[str]) -> dict[str, str]:
    """`--name value`, `--name=value`, `--name` (yes) and `--no_name` as values by name."""
    values: dict[str, str] = {}
    for i, arg in enumerate(argv):
        if not arg.startswith("--"):
            continue
        name, _, value = arg[2:].partition("=")
        following = argv[i + 1] if i + 1 < len(argv) else "--"
        if "=" not in arg:
            value = "true" if following.startswith("--") else following
        name = name.replace("-", "_")
        values[name] = value
        if name.startswith("no_"):
            values[name.removeprefix("no_")] = "false"
    return values


def _plain(value: Any) -> Any:
    text = str(value).lower()
    return True if text in _YES else False if text in _NO else text
