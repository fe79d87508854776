"""Ranges and choices of values: what is outside is refused by the name that the user knows it by."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping


def within(name: str, value: float, low: float, high: float, hint: str, *, above: bool = False) -> None:
    """Refuse a number outside `low` to `high`; infinity is never inside.

    Args:
        hint: what to use instead.
        above: `low` itself is outside, too.

    Raises:
        ValueError: naming the field, the value and the range.
    """
    inside = (low < value if above else low <= value) and value <= high and math.isfinite(value)
    if not inside:
        opening, closing = "(" if above else "[", "]" if math.isfinite(high) else ")"
        raise ValueError(f"{name}={value} is out of range {opening}{low}, {high}{closing}: {hint}")


def whole(name: str, value: object, low: int) -> None:
    """Refuse what is not a whole number of at least `low`.

    Raises:
        ValueError: naming the field, the value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(f"{name}={value!r} is out of range: use a whole number of at least {low}")


def one_of(name: str, value: object, known: Collection[str]) -> None:
    """Refuse a word that is none of the known ones.

    Raises:
        ValueError: naming the field, the value and the choices.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(known)}")


def called(name: str, names: Mapping[str, str] | None) -> str:
    """What a user calls an attribute of a settings object: by `names`, else as it is."""
    return (names or {}).get(name, name)


def as_number(value: object) -> float | None:
    """What a user's own function gave, as a float; None when it is no single number: a text, None, several."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # an array's, a tensor's with several numbers; 10**400
        return None
