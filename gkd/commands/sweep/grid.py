"""`field=value,value` into axes, axes into cells."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

# What the sweep itself sets for every run.
OWN_FIELDS = {"seed": "--seeds says how many", "output_dir": "every run has a folder of its own in the sweep's"}


@dataclass(frozen=True)
class Axis:
    """A field, and the values that it takes, as texts."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One value of each axis. The first cell of a grid is its base."""

    index: int
    values: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return ", ".join(f"{field}={value}" for field, value in self.values)

    @property
    def folder(self) -> str:
        """A name that any file system takes, different for every cell."""
        plain = re.sub(r"[^\w.+-]+", "_", "_".join(f"{field}-{value}" for field, value in self.values))
        return f"{self.index:02d}_{plain[:80]}"


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


def _axis(text: str, option: str) -> Axis:
    name, equals, rest = text.partition("=")
    field = name.strip().removeprefix("--").replace("-", "_")
    if not field or not equals:
        raise ValueError(f'{option} {text!r} should be a field and its values, for example {option} "lmbda=0,0.5,1"')
    if field in OWN_FIELDS:
        raise ValueError(f"{option}: {field} is set by the sweep ({OWN_FIELDS[field]}): leave it out")
    values = [value.strip() for value in split_values(rest)]
    if not all(values):
        missing = "names no value" if values == [""] else "has an empty value"
        raise ValueError(f'{option} {text!r} {missing}: for example {option} "{field}=1,2"')
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{option}: {field}={value} comes twice: leave one of them out")
    return Axis(field, tuple(values))


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


def cells_of(axes: Sequence[Axis]) -> list[Cell]:
    """All combinations, the last axis the fastest."""
    lines = itertools.product(*([(axis.field, value) for value in axis.values] for axis in axes))
    return [Cell(index, tuple(line)) for index, line in enumerate(lines)]
