"""Divergences by name: which there are, and one made with those of the parameters that it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from gkd.loss.divergences import (
    adaptive_kl,
    alpha_beta,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from gkd.loss.integrand import Divergence

#: Name -> factory. To add a divergence, add a line; the factory's keyword parameters are those of `make_divergence`.
DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "jsd": jsd,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
    "symmetric_kl": symmetric_kl,
}


def make_divergence(
    name: str,
    *,
    beta: float = 0.5,
    skew_lambda: float = 0.1,
    ab_alpha: float = 0.5,
    ab_beta: float = 0.5,
    akl_mu: float = 0.5,
    symmetric_kl_weight: float = 0.5,
) -> Divergence:
    """The divergence called `name` with those of the parameters that it has.

    Raises:
        ValueError: an unknown name; a parameter that this divergence does not have and that is not at its default
            (it would be ignored); a parameter out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence={name!r} is unknown: choose one of {', '.join(sorted(DIVERGENCES))}")
    given = {
        "beta": beta,
        "skew_lambda": skew_lambda,
        "ab_alpha": ab_alpha,
        "ab_beta": ab_beta,
        "akl_mu": akl_mu,
        "symmetric_kl_weight": symmetric_kl_weight,
    }
    known = inspect.signature(make_divergence).parameters
    takes = inspect.signature(DIVERGENCES[name]).parameters
    for parameter, value in given.items():
        if parameter not in takes and value != known[parameter].default:
            raise ValueError(
                f"{parameter}={value} has no effect on divergence={name!r}: leave it at {known[parameter].default}, "
                "or choose a divergence that has it"
            )
    return DIVERGENCES[name](**{parameter: value for parameter, value in given.items() if parameter in takes})
