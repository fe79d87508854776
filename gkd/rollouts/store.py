"""Completions on disk, found again by the hash of their prompt; several processes may write and read at once.

A store is a folder. Each process appends to a file of its own (`*.jsonl`), so no two writers ever meet in one file and
nobody appends behind a torn record. A record is one line `{"key": ..., "ids": [...], "sum": ...}` with a CRC-32 of key
and ids; a line that is cut off (a writer that was killed) or does not match its sum is skipped with a warning, and its
completion is simply made again. Only JSON is read, nothing is unpickled. In memory there is one place in a file per
completion, not the completion.

`about.json` says for humans what the completions are; the folder's name is a hash of the same (`open_store`).
"""

from __future__ import annotations

import errno
import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd.common.disk import full_disk_explained
from gkd.common.keyed_folder import digest, open_folder, own_file_name

logger = logging.getLogger(__name__)

FORMAT = 1
_REMEDY = "What was kept before is untouched: make room, or name another place with teacher_cache_dir"


def prompt_number(prompt: Sequence[int]) -> int:
    """A 63-bit number of a prompt's ids, the same everywhere: what a cached completion's random numbers go by."""
    return int(digest(list(prompt))[:16], 16) >> 1


def open_store(folder: str | Path, key: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> SequenceStore:
    """The store of everything made under `key`, below `folder`.

    Args:
        folder: holds one store per key.
        key: all that a completion depends on beside its prompt. Another key is another store.
        notes: written beside it for humans; decides nothing.

    Raises:
        ValueError: the folder is not there and cannot be made.
        DiskFullError: not even that has room.
    """
    name = digest({"format": FORMAT, **key})
    path = Path(folder).expanduser() / name[:16]
    unusable = (
        f"teacher_cache_dir={str(folder)!r} cannot be made or read ({{reason}}): name a folder that can be written "
        "to, or off"
    )
    open_folder(path, {"key": key, "notes": notes or {}}, "the teacher's sequences", _REMEDY, unusable)
    return SequenceStore(path, name)


@dataclass
class _Shard:
    """How far a file has been read; `unfinished`: its last line was not whole."""

    read: int = 0
    lines: int = 0
    unfinished: bool = False


class SequenceStore:
    """Completions by prompt in one folder. Use `open_store`.

    A folder of somebody else is read as far as its files may be; what cannot be written there is kept in memory.

    Args:
        path: the folder; it exists.
        key: hash of all that completions depend on beside the prompt; part of every record's key.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._places: dict[bytes, tuple[str, int]] = {}  # record key -> file name and offset in it
        self._shards: dict[str, _Shard] = {}
        self._own: str | None = None
        self._in_memory: dict[bytes, list[int]] | None = None  # once the folder has turned out not to be writable
        self.refresh()

    def __len__(self) -> int:
        return len(self._places) + len(self._in_memory or ())

    def __contains__(self, prompt: object) -> bool:
        assert isinstance(prompt, (list, tuple)), type(prompt)
        key = self._record_key(prompt)
        return key in self._places or (self._in_memory is not None and key in self._in_memory)

    def about(self) -> dict[str, Any]:
        """`key` and `notes` as `open_store` was given them (the notes by whoever came first)."""
        return dict(json.loads((self.path / "about.json").read_text(encoding="utf-8")))

    def get(self, prompt: Sequence[int]) -> list[int]:
        """The completion of a prompt that is in the store.

        Raises:
            KeyError: it is not.
            ValueError: its record was changed or removed by somebody else meanwhile.
        """
        key = self._record_key(prompt)
        if self._in_memory is not None and key in self._in_memory:
            return list(self._in_memory[key])
        name, offset = self._places[key]
        try:
            with open(self.path / name, "rb") as file:
                file.seek(offset)
                record = _parsed(file.readline())
        except OSError:
            record = None
        if record is None or record[0] != key:
            raise ValueError(f"{self.path / name} was changed while it was in use: start again (it will be re-read)")
        return record[1]

    def add(self, completions: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Append (prompt, completion) pairs to this process's own file, and hand them to the operating system. Where
        nothing may be written, they are kept for this run only.

        Raises:
            DiskFullError: there is no space left for them.
        """
        pairs = [(self._record_key(prompt), list(ids)) for prompt, ids in completions]
        if not pairs:
            return
        if self._in_memory is not None:
            self._in_memory.update({key: ids for key, ids in pairs if key not in self._places})
            return
        try:
            self._append([(key, _line(key, ids)) for key, ids in pairs])
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            logger.warning(
                "%s cannot be written to (%s): the sequences that are there are used, new ones are kept for this run "
                "only; for a folder that several users share, give them a group that may write, or one folder each "
                "with teacher_cache_dir",
                self.path,
                error.strerror,
            )
            self._in_memory = {key: ids for key, ids in pairs if key not in self._places}

    def _append(self, lines: list[tuple[bytes, bytes]]) -> None:
        if self._own is None:
            self._own = f"{own_file_name()}.jsonl"
            self._shards[self._own] = _Shard()
        shard = self._shards[self._own]
        path = self.path / self._own
        with full_disk_explained("a sequence of the teacher", path, _REMEDY), open(path, "ab") as file:
            assert file.tell() == shard.read, "this file has one writer"
            file.write(b"".join(line for _, line in lines))
        for key, line in lines:
            self._places.setdefault(key, (self._own, shard.read))
            shard.read += len(line)
            shard.lines += 1

    def refresh(self) -> None:
        """Read what other processes have added since the last time."""
        for path in sorted(self.path.glob("*.jsonl")):
            known = path.name in self._shards
            shard = self._shards.setdefault(path.name, _Shard())
            try:  # a folder or a pipe of that name has no records, and a pipe would be waited for
                if path.name != self._own and path.is_file() and path.stat().st_size > shard.read:
                    self._read(path, shard)
            except OSError as error:
                if not known:
                    logger.warning("%s cannot be read (%s): it is left out", path, error.strerror)

    def _read(self, path: Path, shard: _Shard) -> None:
        with open(path, "rb") as file:
            file.seek(shard.read)
            for line in file:
                if not line.endswith(b"\n"):
                    if not shard.unfinished:  # its writer may be at it right now, so look again another time
                        logger.warning("%s ends in an incomplete record (a killed run?): it is left out", path)
                    shard.unfinished = True
                    return
                shard.lines += 1
                record = _parsed(line)
                if record is None:
                    logger.warning("%s, line %d does not match its checksum: it is left out", path, shard.lines)
                else:
                    self._places.setdefault(record[0], (path.name, shard.read))
                shard.read += len(line)

    def _record_key(self, prompt: Sequence[int]) -> bytes:
        return bytes.fromhex(digest([self.key, list(prompt)]))


def _line(key: bytes, ids: Sequence[int]) -> bytes:
    record = {"key": key.hex(), "ids": list(ids), "sum": _checksum(key.hex(), list(ids))}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> tuple[bytes, list[int]] | None:
    """Key and ids of a record; None when it is not whole."""
    try:
        record = json.loads(line)
        key, ids, total = record["key"], record["ids"], record["sum"]
        whole = isinstance(ids, list) and all(type(token) is int and 0 <= token < 1 << 63 for token in ids)
        if not whole or total != _checksum(key, ids):
            return None
        return bytes.fromhex(key), ids
    except (ValueError, TypeError, KeyError, RecursionError):  # json's and the decoder's errors are ValueErrors
        return None


def _checksum(key: str, ids: list[int]) -> int:
    return zlib.crc32(f"{key} {ids}".encode())
