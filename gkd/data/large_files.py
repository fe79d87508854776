"""Large local files as data sets that stay on disk (memory-mapped), read by `datasets`, once for all ranks and runs.

`datasets` reads JSON Lines with Arrow, in parts, and keeps the table in its cache (HF_DATASETS_CACHE). Arrow has one
type for a column, and makes dates of texts that look like dates, so its table is taken where it can only hold what
stands in the file; for the rest, and to name a broken line, there is the exact reader (`gkd.data.files`), whose table
is kept in the same cache.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute as pc
import pyarrow.ipc
from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from gkd._version import __version__
from gkd.common.keyed_folder import digest

LARGE = 16 * 2**20  # bytes; what is smaller is read into memory
_LINES = (".jsonl", ".ndjson")
_EXACT = 2.0**53  # a larger float may have been an integer with more digits
_KEPT = "gkd_rows"  # folder in the cache of `datasets`
_ROWS = 10_000  # rows of a part that is written


def read_large(path: Path, read: Callable[[Path], Iterator[pyarrow.Table]]) -> Dataset:
    """The rows of a large file, memory-mapped.

    Args:
        path: of the file.
        read: the exact reader; gives tables of one schema, at least one.

    Raises:
        ValueError: as `read` does.
    """
    kept = Path(datasets.config.HF_DATASETS_CACHE) / _KEPT / f"{_key(path)}.arrow"
    if not kept.is_file() and path.suffix.lower() in _LINES and _holds_objects(path):
        found = _as_lines(path)
        if found is not None:
            return found
    if not kept.is_file():
        tables = read(path)
        first = next(tables)
        _keep(first.schema, chain([first], tables), kept)
    return Dataset.from_file(str(kept))


def _key(path: Path) -> str:
    """Another one for every change of the file."""
    state = path.stat()
    return digest({"path": str(path.resolve()), "size": state.st_size, "time": state.st_mtime_ns, "by": __version__})


def _holds_objects(path: Path) -> bool:
    """Whether the first two lines begin as objects. `datasets` would find rows inside a value that is alone."""
    with path.open("rb") as file:
        written = (line.lstrip(b"\xef\xbb\xbf \t\r\n") for line in file)
        first = list(islice((line for line in written if line), 2))
    return len(first) == 2 and all(line.startswith(b"{") for line in first)


def _as_lines(path: Path) -> Dataset | None:
    """What `datasets` reads; None where it cannot, or may have changed a value."""
    try:
        with _unheard():
            found = load_dataset("json", data_files=str(path), split="train")
    except (DatasetsError, ValueError, TypeError):  # the exact reader says what is wrong with it
        return None
    return found if len(found) and all(_is_exact(found, name) for name in found.column_names) else None


@contextmanager
def _unheard() -> Iterator[None]:
    """What it logs of a file that it cannot read is told by the exact reader, with the line."""
    logger = logging.getLogger("datasets.packaged_modules.json.json")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _is_exact(rows: Dataset, name: str) -> bool:
    """Whether a column of this type holds what stands in the file: texts, numbers, lists of them, and turns of a chat,
    which all have the same keys with a text each."""
    chunks = rows.data.column(name).chunks
    return all(_is_exact_array(feature=rows.features[name], array=chunk) for chunk in chunks)


def _is_exact_array(feature: Any, array: Any) -> bool:
    if isinstance(feature, Value):
        if feature.dtype == "float64":
            return not bool(pc.any(pc.greater_equal(pc.abs(array), _EXACT)).as_py())
        return feature.dtype in ("string", "int64", "bool", "null")
    if isinstance(feature, datasets.List):
        return _is_exact_array(feature.feature, array.flatten())
    if isinstance(feature, dict):
        fields = [array.field(number) for number in range(array.type.num_fields)]
        texts = all(isinstance(one, Value) and one.dtype == "string" for one in feature.values())
        return texts and all(field.null_count == 0 for field in fields)
    return False


def _keep(schema: pyarrow.Schema, tables: Iterable[pyarrow.Table], kept: Path) -> None:
    """Whole or not there: another process may be at it, too."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    own = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        with pyarrow.OSFile(str(own), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table, max_chunksize=_ROWS)
        own.replace(kept)
    finally:
        own.unlink(missing_ok=True)
