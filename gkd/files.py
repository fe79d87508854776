"""Local data files as data sets: JSON, JSON Lines, CSV, Parquet, with the line number of what is broken."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset

_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def read_rows(path: str | Path) -> Dataset:
    """Reads a local file of rows; nothing is downloaded or cached.

    `.jsonl`: an object per line. `.json`: a list of objects, an object per line, or an object whose only list of
    objects is the rows ({"data": [...]}). `.csv`, `.tsv`: a header line; every cell is text. `.parquet`.

    Raises:
        ValueError: the file is missing, empty, of another kind, or broken; broken lines are named by number.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"the data file {path} {what}")
    ending = path.suffix.lower()
    if ending not in _ENDINGS:
        raise ValueError(f"the data file {path} should end with one of {', '.join(_ENDINGS)}")
    if ending == ".parquet":
        return _nonempty(_read_parquet(path), path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the data file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if ending in (".csv", ".tsv"):
        rows = _csv_rows(text, path, "," if ending == ".csv" else "\t")
    else:
        rows = _json_rows(text, path) if ending == ".json" else _json_lines(text, path)
    return _nonempty(_dataset(rows, path), path)


def _nonempty(dataset: Dataset, path: Path) -> Dataset:
    if len(dataset) == 0:
        raise ValueError(f"the data file {path} is empty: it has no rows")
    return dataset


def _read_parquet(path: Path) -> Dataset:
    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"the data file {path} is not a readable Parquet file: {error}") from error


def _dataset(rows: list[dict[str, Any]], path: Path) -> Dataset:
    """A data set with the columns of all rows, not only of the first; a row without a column has None there."""
    columns = dict.fromkeys(column for row in rows for column in row)
    table = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        try:
            table[column] = pyarrow.array(values)
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
            number = next(n for n, value in enumerate(values) if not _is_unicode(value))
            text = f"{path}, row {number}: column '{column}' is not valid Unicode: {error.reason}"
            raise ValueError(text) from error
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(
                f"the data file {path} holds values of different types in column '{column}': {error}"
            ) from error
    return Dataset(pyarrow.table(table))


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            return _json_lines(text, path)
        raise ValueError(f"{path}, line {error.lineno}: broken JSON: {error.msg} (column {error.colno})") from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        is_row = {"messages", "conversations", "prompt"} & value.keys()
        value = lists[0] if len(lists) == 1 and not is_row else [value]
    if not isinstance(value, list):
        raise ValueError(f"{path}: should hold a list of objects, holds a {type(value).__name__}")
    for number, row in enumerate(value):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: should be an object with columns, is a {type(row).__name__}")
    return value


def _json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines(): JSON text may hold line separators such as U+2028 unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: broken JSON: {error.msg} (column {error.colno})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: should be an object with columns, is a {type(row).__name__}")
        rows.append(row)
    return rows


def _csv_rows(text: str, path: Path, delimiter: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                cells = f"{len(reader.fieldnames or [])} columns in the header"
                raise ValueError(f"{path}, line {reader.line_num}: too many or too few cells for {cells}")
            rows.append(dict(row))
    except csv.Error as error:
        line = min(reader.line_num + 1, len(text.splitlines()))
        raise ValueError(f"{path}, line {line}: broken CSV: {error}") from error
    return rows
