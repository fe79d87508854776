"""A folder that is named by the hash of what its files depend on (`digest`), with that in its about.json."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gkd.common.disk import full_disk_explained, write_whole
from gkd.common.errors import DiskFullError


def readable_folder(path: Path) -> bool:
    """Whether its files can be found: somebody else's folder may be closed, and then looks empty."""
    return os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK)


def open_folder(path: Path, about: Mapping[str, Any], what: str, remedy: str, unusable: str) -> None:
    """Make a store's folder with its about.json, unless whoever came first has.

    Args:
        path: the folder. about: what its files depend on, and notes for humans.
        what, remedy: for a full disk, as in `full_disk_explained`.
        unusable: the error when the folder is not there and cannot be made; `{reason}` stands for why.

    Raises:
        ValueError: the folder is not there and cannot be made.
        DiskFullError: not even that has room.
    """
    try:
        with full_disk_explained(what, path, remedy):
            path.mkdir(parents=True, exist_ok=True)
        if not (path / "about.json").exists():
            write_whole(path / "about.json", json.dumps(about, indent=2).encode() + b"\n", what, remedy)
    except DiskFullError:
        raise
    except OSError as error:
        if not readable_folder(path):
            raise ValueError(unusable.replace("{reason}", str(error.strerror))) from error


def own_file_name() -> str:
    """What no other process names a file: host, process and a random number."""
    host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


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
