"""Local data files as data sets: JSON, JSON Lines, CSV, Parquet, with the line number of what is broken."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, Json, concatenate_datasets

from gkd.data.formats import LEADING
from gkd.data.large_files import LARGE, read_large

logger = logging.getLogger(__name__)

DATA_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # of all that names local files
_AT_ONCE = 1000  # rows compared at a time
# What a damaged Parquet file ends in: its pages, its schema, or the description of a data set in its metadata.
_DAMAGE = (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def read_rows(path: str | Path, large: bool = False) -> Dataset:
    """Reads a local file of rows; nothing is downloaded. A large one, or one of many (`large`), stays on disk
    (`gkd.data.large_files`).

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
    if ending not in DATA_ENDINGS:
        raise ValueError(f"the data file {path} should end with one of {', '.join(DATA_ENDINGS)}")
    if large or path.stat().st_size > LARGE:
        return _nonempty(read_large(path, _tables), path)
    tables = list(_tables(path))
    return _nonempty(Dataset(pyarrow.concat_tables(tables)), path)


def _tables(path: Path) -> Iterator[pyarrow.Table]:
    """All rows exactly as they stand in the file, in tables of one schema."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        yield from _parquet_tables(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the data file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if ending in (".csv", ".tsv"):
        rows = _csv_rows(text, path, "," if ending == ".csv" else "\t")
    else:
        rows = _json_rows(text, path) if ending == ".json" else _json_lines(text, path)
    yield _table(rows, path)


def _nonempty(dataset: Dataset, path: Path) -> Dataset:
    if len(dataset) == 0:
        raise ValueError(f"the data file {path} is empty: it has no rows")
    return dataset


def _parquet_tables(path: Path) -> Iterator[pyarrow.Table]:
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        Dataset(file.schema_arrow.empty_table())  # what describes a data set in its metadata can be read
        yield file.schema_arrow.empty_table()
        for batch in file.iter_batches():
            table = pyarrow.Table.from_batches([batch])
            table.validate(full=True)  # offsets and UTF-8, which reading alone does not look at
            yield table
    except _DAMAGE as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"the data file {path} is not a readable Parquet file: {said or type(error).__name__}"
        ) from error


def _table(rows: list[dict[str, Any]], path: Path) -> pyarrow.Table:
    """A table with the columns of all rows, not only of the first; a row without a column has None there."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return pyarrow.table({column: _array([row.get(column) for row in rows], column, path) for column in columns})


def _array(values: list[Any], column: str, path: Path) -> pyarrow.Array:
    """A column as one Arrow type where that keeps every value as it is, else as JSON: Arrow has one type for a column,
    and gives each object the keys of all the others."""
    try:
        try:
            array = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
            return _json_array(values)
        return array if _kept(values, array) else _json_array(values)
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        number = next(n for n, value in enumerate(values) if not _is_unicode(value))
        text = f"{path}, row {number}: column '{column}' is not valid Unicode: {error.reason}"
        raise ValueError(text) from error


def _kept(values: list[Any], array: pyarrow.Array) -> bool:
    """Whether an Arrow array gives the values back as they were: their keys, in their order."""
    if not any(isinstance(value, (dict, list)) for value in values) or _are_plain_chats(values):
        return True
    parts = (slice(start, start + _AT_ONCE) for start in range(0, len(values), _AT_ONCE))
    return all(json.dumps(array[part].to_pylist()) == json.dumps(values[part]) for part in parts)


def _are_plain_chats(values: list[Any]) -> bool:
    """Lists of objects with the same keys and text in each: the many files for which nothing needs to be compared."""
    keys = None
    for value in values:
        for turn in value if isinstance(value, list) else (None,):
            if not isinstance(turn, dict) or (keys is not None and tuple(turn) != keys):
                return False
            keys = tuple(turn)
            if not all(type(item) is str for item in turn.values()):
                return False
    return True


def _json_array(values: list[Any]) -> pyarrow.Array:
    """A column of JSON values; or, where decoding those loses digits of a number, of texts: JSON but for texts. NaN, a
    table's empty cell, is None among them, never the text "NaN"."""
    values = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    if all(text is None or _decoded(text) == json.dumps(value) for value, text in zip(values, texts, strict=True)):
        return pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts, pyarrow.string()))
    as_text = [value if isinstance(value, str) else text for value, text in zip(values, texts, strict=True)]
    return pyarrow.array(as_text, pyarrow.string())


def in_json(rows: Dataset, columns: Sequence[str]) -> Dataset:
    """The data set with these columns as JSON, whose values may be of any kind: so it goes together with others."""
    for name in columns:
        texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in rows[name]]
        array = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts, pyarrow.string()))
        own = Dataset(pyarrow.table({name: array}))
        rest = rows.remove_columns(name)
        rows = concatenate_datasets([rest, own], axis=1) if rest.column_names else own
    return rows


def _decoded(text: str) -> str | None:
    try:
        return json.dumps(Json().decode_example(text))
    except (ValueError, OverflowError):  # an integer beyond 64 bits
        return None


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(text: str, path: Path) -> list[dict[str, Any]]:
    twice: dict[str, list[int]] = {}
    try:
        value = _parsed(text, 1, twice)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            return _json_lines(text, path)
        raise ValueError(f"{path}, line {error.lineno}: broken JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON: {error}") from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        value = lists[0] if len(lists) == 1 and not set(LEADING) & value.keys() else [value]
    if not isinstance(value, list):
        raise ValueError(f"{path}: should hold a list of objects, holds a {type(value).__name__}")
    for number, row in enumerate(value):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: should be an object with columns, is a {type(row).__name__}")
    _warn_of_repeated_keys(twice, path, lines=False)
    return value


def _json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    twice: dict[str, list[int]] = {}
    # Not splitlines(): JSON text may hold line separators such as U+2028 unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line, number, twice)
        except json.JSONDecodeError as error:
            hint = "; a list of objects over several lines is .json" if not rows and line.lstrip()[0] in "[{" else ""
            raise ValueError(
                f"{path}, line {number}: broken JSON: {error.msg} (column {error.colno}){hint}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: broken JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: should be an object with columns, is a {type(row).__name__}")
        rows.append(row)
    _warn_of_repeated_keys(twice, path, lines=True)
    return rows


def _parsed(text: str, line: int, twice: dict[str, list[int]]) -> Any:
    """The JSON value; keys that stand twice in one object of it are added to `twice`, with the line."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            for key in [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
                twice.setdefault(key, []).append(line)
        return value

    return json.loads(text, object_pairs_hook=object_of)


def _warn_of_repeated_keys(twice: dict[str, list[int]], path: Path, lines: bool) -> None:
    for key, where in twice.items():
        place = f" (line {where[0]}{', and more' if len(where) > 1 else ''})" if lines else ""
        logger.warning("%s: the key %r stands twice in one object%s; its last value counts", path, key, place)


def _csv_rows(text: str, path: Path, delimiter: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a cell may hold a whole document
    try:
        if twice := [name for name, count in Counter(reader.fieldnames or []).items() if count > 1]:
            raise ValueError(f"{path}, line 1: the column {twice[0]!r} stands twice in the header")
        for row in reader:
            if None in row or None in row.values():
                cells = f"{len(reader.fieldnames or [])} columns in the header"
                raise ValueError(f"{path}, line {reader.line_num}: too many or too few cells for {cells}")
            rows.append(dict(row))
    except csv.Error as error:
        line = min(reader.line_num + 1, len(text.splitlines()))
        raise ValueError(f"{path}, line {line}: broken CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return rows
