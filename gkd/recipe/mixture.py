"""A mixture of data sets (`datasets` in YAML): entries with a weight and a teacher each, made one data set.

The mixture is a data set like any other, drawn once from the seed (`datasets.interleave_datasets`) before anything is
tokenized. So which row stands where is a function of seed and row alone, whatever the ranks and the resumes, and all
that reads a data set reads a mixture.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from datasets import Dataset, concatenate_datasets, interleave_datasets

from gkd.data.folders import alike
from gkd.data.row_report import MIXED_FROM

logger = logging.getLogger(__name__)

_EXAMPLE = '[{"path": "rows.jsonl", "weight": 2}, {"path": "org/name", "split": "train", "weight": 1}]'
# Other names of the keys; `name` is the data set itself where there is no path, else its configuration, as in TRL.
_CALLED = {"file": "path", "config": "name"}
_TEXTS = ("path", "name", "split", "test_split", "teacher")
_OF_TRL = ("data_dir", "data_files")


@dataclass(frozen=True)
class Entry:
    """One data set of a mixture.

    Attributes:
        number: of the entry, from 0.
        path: a name on the Hub, a local file or folder. name: its configuration.
        split: to train on. test_split: to hold out; None = "test", where there is one.
        weight: share of the mixture, in relation to the other weights; rows of a set that is too small come again.
        fraction: TRL's word: the same, but no row comes twice, and the mixture ends with the first set that does.
        teacher: of its rows that name none, of several.
        columns: new names of columns by their old ones; or the columns to keep.
    """

    number: int
    path: str
    name: str | None = None
    split: str = "train"
    test_split: str | None = None
    weight: float | None = None
    fraction: float | None = None
    teacher: str | None = None
    columns: dict[str, str] | list[str] | None = None

    @property
    def label(self) -> str:
        """What errors call it."""
        return f"datasets[{self.number}] ({self.path})"

    @property
    def share(self) -> float | None:
        """Its weight or fraction."""
        return self.weight if self.weight is not None else self.fraction


def entries_of(value: Any) -> list[Entry]:
    """What `datasets` says, as a list or as JSON.

    Raises:
        ValueError: naming the entry, the key and the remedy.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"datasets={value!r} is no JSON ({error}): write for example {_EXAMPLE}") from error
    if not isinstance(value, list) or not value:
        raise ValueError(f"datasets={value!r} should be a list of data sets, for example {_EXAMPLE}")
    found = [_entry(number, one) for number, one in enumerate(value)]
    for kind in ("weight", "fraction"):
        without = [entry.label for entry in found if getattr(entry, kind) is None]
        if 0 < len(without) < len(found):
            raise ValueError(f"{without[0]} has no {kind}, and others have one: give every entry one, or none")
    return found


def _entry(number: int, given: Any) -> Entry:
    what = f"datasets[{number}]"
    if not isinstance(given, Mapping):
        raise ValueError(f"{what}={given!r} should be a mapping with the key path, for example {_EXAMPLE}")
    known = [field.name for field in fields(Entry) if field.name != "number"]
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = _CALLED.get(key, key)
        if name in _OF_TRL:
            raise ValueError(f"{what}: {key} is not supported: give the file or the folder as path")
        if name not in known:
            near = difflib.get_close_matches(str(key), [*known, *_CALLED], n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise ValueError(f"{what}: there is no key {key!r}; {hint}")
        if name in values:
            raise ValueError(f"{what}: {key} says {name} a second time: leave one of them out")
        values[name] = value
    if "path" not in values and "name" in values and "config" not in given:
        values["path"] = values.pop("name")
    if values.get("path") is None:
        raise ValueError(f"{what} names no data set: give it a path, a name on the Hub or a local file")
    return _checked(what, number, values)


def _checked(what: str, number: int, values: dict[str, Any]) -> Entry:
    for name in _TEXTS:
        if values.get(name) is not None and not (isinstance(values[name], str) and values[name]):
            raise ValueError(f"{what}: {name}={values[name]!r} should be a text")
    for name in ("weight", "fraction"):
        value = values.get(name)
        number_of = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number_of and 0 < value < math.inf):
            raise ValueError(f"{what}: {name}={value!r} should be a number above 0; to leave the set out, take it out")
    if values.get("weight") is not None and values.get("fraction") is not None:
        raise ValueError(f"{what}: weight and fraction both say its share: leave one of them out")
    columns = values.get("columns")
    names = list(columns) + list(columns.values()) if isinstance(columns, dict) else columns
    if columns is not None and not (isinstance(names, list) and names and all(isinstance(one, str) for one in names)):
        raise ValueError(
            f"{what}: columns={columns!r} should be a mapping of old names to new ones, or a list of those to keep"
        )
    return Entry(number, **{name: value for name, value in values.items() if value is not None})


def mixture(entries: Sequence[Entry], load: Callable[[Entry], Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """`train` rows, and `eval` rows where an entry has a test split, else None.

    Args:
        entries: of `entries_of`.
        load: gives the splits of an entry.
        seed: which row comes when depends on it.

    Raises:
        ValueError: naming the entry: it lacks a split or a column.
    """
    train, held_out = [], []
    for entry in entries:
        splits = load(entry)
        train.append(_rows(entry, splits, entry.split))
        test = entry.test_split or "test"
        if test == entry.split and entry.test_split is not None:
            raise ValueError(f"{entry.label}: test_split={test!r} is what is trained on: hold out another split")
        if test != entry.split and (test in splits or entry.test_split is not None):
            held_out.append(_rows(entry, splits, test))
    mixed = _mixed(alike(train), entries, seed)
    _tell_shares(mixed, entries)
    return {"train": mixed, "eval": concatenate_datasets(alike(held_out)) if held_out else None}


def _rows(entry: Entry, splits: Mapping[str, Any], split: str) -> Dataset:
    """One split, with its columns called as the entry says, its teacher, and where its rows are from."""
    if split not in splits:
        raise ValueError(f"{entry.label}: there is no split {split!r}: it has {', '.join(splits)}")
    rows: Dataset = splits[split]
    columns = entry.columns or {}
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        has = ", ".join(rows.column_names)
        raise ValueError(f"{entry.label}: there is no column {missing[0]!r} in its split {split!r}: it has {has}")
    if isinstance(columns, list):
        rows = rows.select_columns(columns)
    else:
        # A new name that another column has already takes its place.
        taken = [new for new in columns.values() if new in rows.column_names and new not in columns]
        rows = rows.remove_columns(taken).rename_columns(columns)
    if entry.teacher is not None:
        own = list(rows["teacher"]) if "teacher" in rows.column_names else [None] * len(rows)
        rows = rows.remove_columns([name for name in ("teacher",) if name in rows.column_names])
        rows = rows.add_column("teacher", [teacher or entry.teacher for teacher in own])
    return rows.add_column(MIXED_FROM, [entry.path] * len(rows))


def _mixed(parts: list[Dataset], entries: Sequence[Entry], seed: int) -> Dataset:
    shares = [entry.share for entry in entries]
    if shares[0] is None:  # every row once
        return concatenate_datasets(parts)
    total = math.fsum(share for share in shares if share is not None)
    return interleave_datasets(
        parts,
        probabilities=[float(share or 0) / total for share in shares],
        seed=seed,
        stopping_strategy="all_exhausted" if entries[0].weight is not None else "first_exhausted",
    )


def _tell_shares(mixed: Dataset, entries: Sequence[Entry]) -> None:
    paths = mixed[MIXED_FROM]
    counts = dict.fromkeys(dict.fromkeys(entry.path for entry in entries), 0)
    for path in paths:
        counts[path] += 1
    told = ", ".join(f"{count:,} of {path} ({count / len(mixed):.1%})" for path, count in counts.items())
    logger.info("a mixture of %s rows: %s", f"{len(mixed):,}", told)
