"""Fields that may change along a training: a number, or a schedule as a text.

`"0@0 0.5@100 1@300"`: values at steps, straight lines between them, the first value before and the last one behind;
`"0@0% 1@50%"`: at shares of the training; a last word `cosine` bends the lines. The value of a step is a function of
the schedule, the step and the number of steps alone, so it is the same on every rank and after a resume.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from gkd.common.text import shorten

if TYPE_CHECKING:
    from gkd.config.fields import GKDConfig
    from gkd.loss.integrand import Divergence

AUTO = "auto"  # of lmbda: the run decides
SCHEDULED = {"lmbda": float, "max_new_tokens": int, "temperature": float, "beta": float}
_SHAPES = ("linear", "cosine")
_EXAMPLE = 'values at steps ("0@0 0.5@100 1@300") or at shares of the training ("0@0% 1@50%"), "cosine" behind them'


@dataclass(frozen=True)
class Schedule:
    """Values at places of a training, and what is between them.

    Attributes:
        knots: (place, value), places rising; where two have one place, the later holds from there on.
        shares: places are per cent of the training, of which 0 is the first step and 100 the last one; else steps.
        cosine: half a cosine from knot to knot; else a straight line.
        whole: values are rounded to whole numbers.
    """

    knots: tuple[tuple[float, float], ...]
    shares: bool = False
    cosine: bool = False
    whole: bool = False

    def at(self, step: int, max_steps: int) -> float:
        """The value of an optimizer step, the first being 0."""
        place = 100 * step / max(max_steps - 1, 1) if self.shares else float(step)
        value = self._between(place)
        return math.floor(value + 0.5) if self.whole else value

    def _between(self, place: float) -> float:
        after = bisect_right([at for at, _ in self.knots], place)
        if after == 0 or after == len(self.knots):
            return self.knots[max(after - 1, 0)][1]
        (left, low), (right, high) = self.knots[after - 1 : after + 1]
        way = (place - left) / (right - left)
        return low + (high - low) * ((1 - math.cos(math.pi * way)) / 2 if self.cosine else way)

    @property
    def values(self) -> tuple[float, ...]:
        """Of the knots: no step's is outside of them."""
        return tuple(value for _, value in self.knots)

    @property
    def constant(self) -> float | None:
        """The one value, where it never changes."""
        return self.values[0] if len(set(self.values)) == 1 else None


@lru_cache(maxsize=64)
def schedule_of(name: str, value: float | str) -> Schedule:
    """The schedule that a field's value stands for; that of a number is the number.

    Raises:
        ValueError: a text that is none; the field, the value and the form are named.
    """
    whole = SCHEDULED[name] is int
    if not isinstance(value, str):
        return Schedule(((0.0, value),), whole=whole)
    *words, last = value.split() or [""]
    words, shape = (words, last) if last in _SHAPES else ([*words, last], "linear")
    knots = [_knot(name, value, word, whole) for word in words]
    shares = {unit for place, unit, _ in knots if place > 0 or unit}
    if not knots or len(shares) > 1:
        wrong = "mixes steps and shares" if knots else "names no value"
        raise ValueError(f"{_shown(name, value)} {wrong}: it should be a number, or {_EXAMPLE}")
    places = [place for place, _, _ in knots]
    if places != sorted(places):
        raise ValueError(f"{_shown(name, value)}: its places should rise, from left to right")
    return Schedule(tuple((place, of) for place, _, of in knots), shares == {"%"}, shape == "cosine", whole)


def _knot(name: str, value: str, word: str, whole: bool) -> tuple[float, str, float]:
    """`0.5@10%` -> (10, "%", 0.5)."""
    text, at, place = word.partition("@")
    unit = "%" if place.endswith("%") else ""
    try:
        found = float(place.removesuffix("%")), float(text)
    except ValueError:
        found = math.nan, math.nan
    if not at or not all(map(math.isfinite, found)) or found[0] < 0 or (whole and found[1] % 1):
        of = "a whole number" if whole else "a number"
        wrong = f": {shorten(word, 30)!r} is not {of}@place" if "@" in value else ""
        raise ValueError(f"{_shown(name, value)}{wrong}: it should be {of}, or {_EXAMPLE}")
    if unit and found[0] > 100:
        raise ValueError(f"{_shown(name, value)}: {word!r} is behind the end of the training, which is at 100%")
    return found[0], unit, int(found[1]) if whole else found[1]


def _shown(name: str, value: str) -> str:
    return f"{name}={shorten(value, 80)!r}"


def read_schedules(config: GKDConfig) -> None:
    """Make numbers of texts that are numbers, as flags and YAML give them, and of schedules that never change; look at
    all others.

    Raises:
        ValueError: a text that is no schedule.
    """
    for name, kind in SCHEDULED.items():
        value = getattr(config, name)
        if isinstance(value, str) and (name, value) != ("lmbda", AUTO):
            try:
                number: float | None = kind(value)
            except ValueError:
                number = schedule_of(name, value).constant
            if number is not None:
                setattr(config, name, number)


def check_schedules(config: GKDConfig) -> None:
    """Refuse a schedule where it would have no effect.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    for name in ("max_new_tokens", "temperature"):
        value = getattr(config, name)
        if isinstance(value, str) and not config.student_writes:
            raise ValueError(
                f"{_shown(name, value)} is a schedule of the student's rollouts and has no effect with lmbda=0: "
                "give a number"
            )
    if isinstance(config.temperature, str) and config.teacher_writes and config.teacher_temperature is None:
        raise ValueError(
            f"{_shown('temperature', config.temperature)} is a schedule of the student's rollouts, and seq_kd's "
            "sequences of the teacher are all sampled alike: set teacher_temperature to a number"
        )
    if isinstance(config.beta, str) and config.loss_compile:
        raise ValueError(
            f"loss_compile=True does not go with {_shown('beta', config.beta)}, whose every value would be compiled "
            "anew: leave loss_compile out, or give beta a number"
        )


def of_a_schedule(make: Callable[[], Divergence]) -> Divergence:
    """One divergence of many along a schedule: none of them is compiled, and none warned of; the ends have been."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return replace(make(), traceable=False)


def in_words(config: GKDConfig) -> dict[str, str]:
    """The fields that follow a schedule, with it."""
    return {name: value for name in SCHEDULED if isinstance(value := getattr(config, name), str)}
