"""Values of a row: where they stand (for messages), what is JSON as text, and the nulls that Arrow puts in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from datasets import Json


@dataclass(frozen=True)
class RowPlace:
    """Where a row stands: the data set's name and the row's number, for messages; `reader`: in whose reading."""

    dataset: str
    number: int
    reader: str = ""

    def bad(self, column: str, problem: str) -> NoReturn:
        raise ValueError(f"{self}, column '{column}': {problem}")

    def __str__(self) -> str:
        return f"{self.dataset} data set, row {self.number}" + (f", {self.reader}" if self.reader else "")


def describe(value: Any) -> str:
    """A value for a message, with its type."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def text_of(row: Mapping[str, Any], column: str, place: RowPlace) -> str:
    if not isinstance(row[column], str):
        place.bad(column, f"should be text, got {describe(row[column])}")
    return str(row[column])


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: None, NaN (a table's empty cell), blank text, no entries."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (Mapping, list, tuple)) and not value)


def without_none(value: Any) -> Any:
    """Takes out the None entries that Arrow puts where one row lacks a key that another row has."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value


def without_arrow_nulls(value: Any, feature: Any) -> Any:
    """As `without_none`, told by the data set's own type which None are Arrow's: JSON keeps what the user wrote."""
    if value is None or isinstance(feature, Json):
        return value
    if isinstance(feature, dict) and isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if item is not None}
        return {key: without_arrow_nulls(item, feature.get(key)) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_arrow_nulls(item, inner) for item in value]
    return value


def from_json(value: Any, column: str, place: RowPlace) -> Any:
    """A value that may be JSON text, because Arrow wants one type for all rows; blank text is None."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        place.bad(column, f"is text but not JSON: {error}")
