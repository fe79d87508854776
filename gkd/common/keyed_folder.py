"""A folder that is named by the hash of what its files depend on (`digest`)."""

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
