"""`field=value,value` into axes, `name: field=value field=value` into arms, both into cells."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

# What the sweep itself sets for every run.
OWN_FIELDS = {
    "seed": "--seeds says how many, --first_seed from which on",
    "output_dir": "every run has a folder of its own in the sweep's",
}


@dataclass(frozen=True)
class Axis:
    """A field, and the values that it takes, as texts."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """Several fields that go together, under a name."""

    name: str
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Cell:
    """An arm, where there are some, with one value of each axis. The first cell of a sweep is its base."""

    index: int
    values: tuple[tuple[str, str], ...]  # of the axes
    arm: Arm | None = None

    @property
    def all_values(self) -> tuple[tuple[str, str], ...]:
        return (*(self.arm.values if self.arm else ()), *self.values)

    @property
    def _arms_name(self) -> list[str]:
        return [self.arm.name] if self.arm else []

    @property
    def name(self) -> str:
        return ", ".join(
            [*([self.arm.name] if self.arm else []), *(f"{field}={value}" for field, value in self.values)]
        )

    @property
    def folder(self) -> str:
        """A name that any file system takes, different for every cell."""
        return self.numbered(self.index)

    def numbered(self, number: int) -> str:
        """The same with another number in front."""
        parts = [*self._arms_name, *(f"{field}-{value}" for field, value in self.values)]
        plain = re.sub(r"[^\w.+-]+", "_", "_".join(parts))
        return f"{number:02d}_{plain[:80]}"


def flags_of(values: Sequence[tuple[str, str]]) -> list[str]:
    """Fields as flags."""
    return [word for field, value in values for word in (f"--{field}", value)]


def parse_axes(texts: Sequence[str], option: str) -> list[Axis]:
    """The axes that an option's texts name, in their order.

    Raises:
        ValueError: a text that is no axis, a field that comes twice or is the sweep's own, a value that comes twice.
    """
    axes = [_axis(text, option) for text in texts]
    names = [axis.field for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{option}: {name} comes twice: write its values behind one {name}=")
    return axes


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """The arms that the texts of --arm name, in their order.

    Raises:
        ValueError: a text that is no arm, a name that comes twice, a field that does or is the sweep's own.
    """
    arms = [_arm(text) for text in texts]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--arm: the name {name!r} comes twice: give each a name of its own")
    return arms


def _arm(text: str) -> Arm:
    name, colon, rest = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(
            f"--arm {text!r} should be a name and its fields, for example "
            '--arm "on-policy: lmbda=1 divergence=reverse_kl"'
        )
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ValueError(f"--arm {text!r}: {error}") from error
    values: dict[str, str] = {}
    for word in words:
        field, equals, value = word.partition("=")
        field = _field_name(field, "--arm")
        if not field or not equals or not value:
            raise ValueError(f"--arm {text!r}: {word!r} should be a field and its value, for example lmbda=1")
        if field in values:
            raise ValueError(f"--arm {text!r}: {field} comes twice: leave one of them out")
        values[field] = value
    return Arm(name.strip(), tuple(values.items()))


def _axis(text: str, option: str) -> Axis:
    name, equals, rest = text.partition("=")
    field = _field_name(name, option)
    if not field or not equals:
        raise ValueError(f'{option} {text!r} should be a field and its values, for example {option} "lmbda=0,0.5,1"')
    values = [value.strip() for value in split_values(rest)]
    if not all(values):
        missing = "names no value" if values == [""] else "has an empty value"
        raise ValueError(f'{option} {text!r} {missing}: for example {option} "{field}=1,2"')
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{option}: {field}={value} comes twice: leave one of them out")
    return Axis(field, tuple(values))


def _field_name(text: str, option: str) -> str:
    field = text.strip().removeprefix("--").replace("-", "_")
    if field in OWN_FIELDS:
        raise ValueError(f"{option}: {field} is set by the sweep ({OWN_FIELDS[field]}): leave it out")
    return field


def split_values(text: str) -> list[str]:
    """The text cut at its commas, but for those within brackets, braces and double quotes: values may be JSON."""
    parts, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def cells_of(axes: Sequence[Axis], arms: Sequence[Arm] = ()) -> list[Cell]:
    """All combinations, the last axis the fastest, the arms the slowest."""
    lines = list(itertools.product(*([(axis.field, value) for value in axis.values] for axis in axes)))
    with_arms: list[Arm | None] = [*arms] or [None]
    pairs = itertools.product(with_arms, lines)
    return [Cell(index, tuple(line), arm) for index, (arm, line) in enumerate(pairs)]
