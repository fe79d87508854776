"""Completions on disk, found again by the hash of their prompt; several processes may write and read at once.

A store is a folder. Each process appends to a file of its own (`*.jsonl`), so no two writers ever meet in one file and
nobody appends behind a torn record. A record is one line `{"key": ..., "ids": [...], "sum": ...}` with a CRC-32 of key
and ids; a line that is cut off (a writer that was killed) or does not match its sum is skipped with a warning, and its
completion is simply made again. Only JSON is read, nothing is unpickled. In memory there is one place in a file per
completion, not the completion.

`about.json` says for humans what the completions are; the folder's name is a hash of the same (`open_store`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest(value: Any) -> str:
    """32 hexadecimal digits (BLAKE2b) of a value made of dicts, lists, text, numbers, bools and None.

    Raises:
        TypeError: anything else, since its text would not say what it does.
    """
    text = json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """JSON without its two ambiguities: mappings become sorted pairs (a key need not be text), tuples lists."""
    if isinstance(value, Mapping):
        pairs = [[_plain(key), _plain(item)] for key, item in value.items()]
        return {"pairs": sorted(pairs, key=lambda pair: json.dumps(pair[0]))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no hash that says what it does")
