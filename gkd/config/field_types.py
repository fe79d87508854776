"""Values of the wrong kind: from Python a field takes anything, and from YAML what is written there.

A whole number where a fraction may stand is one; everything else of another kind is refused here, since the range
checks and the libraries behind them would stop at it with an error that names no field.
"""

from __future__ import annotations

import dataclasses
import enum
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from gkd.common.redact import redact_value

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}


_MAY_BE_OFF = ("teacher_cache_dir", "collapse_guard")  # YAML reads a bare `off` as False


class _UnfitError(Exception):
    pass


def kinds(*dataclass_types: type) -> dict[str, tuple[Any, ...]]:
    """The kinds of the fields of dataclasses, those of dictionaries and objects left out."""
    return {name: members for kind in dataclass_types for name, (members, _) in _fields(kind).items()}


def check_types(config: Any, own: Collection[str] | None = None) -> None:
    """Bring every field of a dataclass to its type, or refuse its value. Dictionaries and objects are left alone.

    Args:
        config: an instance, before its own checks.
        own: fields that are converted (`temperature=2` -> 2.0, a path -> text), all when None; others are looked at.

    Raises:
        ValueError: naming the field, the value and what should stand there.
    """
    kind: Any = type(config)
    for name, (members, default) in _fields(kind).items():
        value = getattr(config, name)
        if value is default or (value is None and type(None) in members):
            continue
        fitting = fit(name, value, members)
        if own is None or name in own or isinstance(fitting, enum.Enum):
            setattr(config, name, fitting)


def fit(name: str, value: Any, members: tuple[Any, ...]) -> Any:
    """The value as the first of the kinds that can hold it.

    Raises:
        ValueError: none can.
    """
    if value is False and name in _MAY_BE_OFF:
        return "off"
    for kind in members:
        try:
            return _as(kind, value)
        except _UnfitError:
            continue
    leave = f"{name} is empty" if value is None else f"{name}={describe(value)}"
    raise ValueError(f"{leave}: it should be {wanted(members)}")


def wanted(members: tuple[Any, ...]) -> str:
    """What a field of these kinds takes, in words."""
    choices = [str(member.value) for kind in members if _is_enum(kind) for member in kind]
    words = [f"one of {', '.join(choices)}"] if choices else [_KINDS[kind] for kind in members if kind in _KINDS]
    return " or ".join([*words, "none"] if type(None) in members else words)


def describe(value: Any) -> str:
    """A value in an error: short, on one line."""
    return redact_value(" ".join(reprlib.repr(value).split()))


def members_of(hint: Any) -> tuple[Any, ...]:
    """`int | None` -> (int, NoneType); `list[str]` -> (list,)."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in members_of(part))
    return (origin or hint,)


@lru_cache(maxsize=8)
def _fields(kind: type) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """The kinds of each field that are looked at, and its default."""
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        members = members_of(hints[field.name])
        if not all(member in _KINDS or member is type(None) or _is_enum(member) for member in members):
            continue
        if any(_is_enum(member) for member in members):  # a text beside it names one of its values
            members = tuple(member for member in members if member is not str)
        if list in members:  # an empty one, as the parser writes it
            members = (*members, type(None))
        found[field.name] = (tuple(sorted(members, key=lambda member: member is str)), field.default)
    return found


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _as(kind: Any, value: Any) -> Any:
    if _is_enum(kind):
        return _member(kind, value)
    number = not isinstance(value, bool) and isinstance(value, numbers.Real)
    try:
        if kind is bool and (isinstance(value, bool) or type(value).__module__ == "numpy"):
            return _switch(value)
        if kind is int and number and isinstance(value, numbers.Integral):
            return int(value)
        if kind is float and number:
            return float(value)
        if kind is str and isinstance(value, (str, os.PathLike)):
            return str(os.fspath(value))
        if kind is list and isinstance(value, (list, tuple)):
            return list(value)
    except (OverflowError, TypeError) as error:
        raise _UnfitError from error
    raise _UnfitError


def _switch(value: Any) -> bool:
    """A bool, or numpy's, whose class has had two names."""
    if type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise _UnfitError


def _member(kind: Any, value: Any) -> Any:
    try:
        return kind("no" if value is False else value)  # YAML reads `save_strategy: no` as False
    except (ValueError, TypeError) as error:
        raise _UnfitError from error
