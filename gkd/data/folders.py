"""Folders of text files as data sets: `datasets` says which files are which split, and each is read exactly.

Left to itself `datasets` guesses the type of a column from its values: "007" becomes 7, the answer "NA" nothing, a
text that looks like a date a date, and a line with a cell too many moves into the next columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset_builder

from gkd.data.files import in_json, read_rows
from gkd.data.large_files import LARGE

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TEXTS = {"json": {".json", ".jsonl", ".ndjson"}, "csv": set(_SEPARATORS)}  # by the reader of `datasets`
_OPTIONS = {"json": ("field",), "csv": ("delimiter", "names", "column_names", "header", "skiprows", "quotechar")}


def folder_files(folder: Path, config: str | None) -> dict[str, list[Path]] | None:
    """The files of each split of a folder of JSON, JSON Lines or CSV files; None where it holds something else, or
    says itself (README.md) how its files are read.

    Raises:
        FileNotFoundError, ValueError: of `datasets`, which finds no data files, or several kinds of them.
    """
    builder = load_dataset_builder(str(folder), name=config)
    kind, options = type(builder).__module__.rpartition(".")[2], builder.config
    splits = {str(split): [Path(str(path)) for path in paths] for split, paths in (options.data_files or {}).items()}
    endings = {path.suffix.lower() for paths in splits.values() for path in paths}
    plain = type(options)()
    told = [name for name in _OPTIONS.get(kind, ()) if getattr(options, name) != getattr(plain, name)]
    separated = kind != "csv" or {options.sep} == {_SEPARATORS.get(ending) for ending in endings}
    return splits if endings and endings <= _TEXTS.get(kind, set()) and separated and not told else None


def rows_of_files(splits: Mapping[str, Sequence[Path]]) -> dict[str, Dataset]:
    """The rows of each split, the files of which are read one by one.

    Raises:
        ValueError: a broken file, with its line.
    """
    large = sum(path.stat().st_size for paths in splits.values() for path in paths) > LARGE
    return {
        split: concatenate_datasets(alike([read_rows(path, large) for path in paths]))
        for split, paths in splits.items()
    }


def alike(parts: list[Dataset]) -> list[Dataset]:
    """Sets whose columns of one name have one type: values of any kind as JSON, where they differ. A column that a set
    lacks is empty there."""
    types: dict[str, set[str]] = {}
    for part in parts:
        for name, feature in part.features.items():
            types.setdefault(name, set()).add(repr(feature))
    differ = [name for name, found in types.items() if len(found) > 1]
    return [in_json(part, [name for name in differ if name in part.column_names]) for part in parts]
