"""Kinds of data set objects: which have rows that can be counted, and how their rows are read as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

Transform = Callable[[dict[str, list[Any]]], Mapping[str, list[Any]]]


def check_kind(dataset: Any, name: str) -> None:
    """Refuse what is no data set with rows of known number.

    Raises:
        ValueError: with the remedy.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict, dict)):
        raise ValueError(f"the {name} data set is a dict of splits ({', '.join(dataset)}): pass one of them")
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"the {name} data set is streamed, but its rows must be counted and numbered before training: load it "
            f"without streaming (its rows stay on disk, so it may be larger than the memory), or take rows of it, "
            f"Dataset.from_list(list(stream.take(n)))"
        )
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise ValueError(f"the {name} data set should be a datasets.Dataset, got {kind}: use Dataset.from_list(rows)")
    if len(dataset) == 0:
        raise ValueError(f"the {name} data set is empty: it has no rows")


def as_stored(dataset: Dataset) -> tuple[Dataset, Transform | None]:
    """The data set with plain values (no tensors, arrays or data frames of `set_format`) and the columns that its
    format shows; and what `set_transform` would do to a batch of them."""
    shown = dataset.format
    transform = shown["format_kwargs"].get("transform") if shown["type"] == "custom" else None
    hidden = [] if shown["output_all_columns"] else [c for c in dataset.column_names if c not in shown["columns"]]
    return dataset.with_format(None).remove_columns(hidden), transform


def transformed(columns: dict[str, list[Any]], transform: Transform | None, name: str) -> Mapping[str, list[Any]]:
    """A batch of columns as the data set's own transform gives it.

    Raises:
        ValueError: it gives something else than columns of as many rows.
    """
    if transform is None:
        return columns
    rows = len(next(iter(columns.values())))
    out = transform(columns)
    if not isinstance(out, Mapping) or any(
        not hasattr(column, "__len__") or len(column) != rows for column in out.values()
    ):
        raise ValueError(
            f"the transform of the {name} data set (set_transform) should give columns of {rows} rows, as it got: map "
            f"the data set instead where it adds or leaves out rows"
        )
    return out
