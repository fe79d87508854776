"""Reads back what the W&B client kept of an offline run, from its transaction log.

The log is LevelDB's: after a file header of 7 bytes, blocks of 32 KiB with records of checksum (4 bytes), length (2),
type (1: whole, 2: first, 3: middle, 4: last part) and data; each whole record is one protocol buffer of the client's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, RECORD = 7, 32768, 7


@dataclass
class OfflineRun:
    """`config` and `summary` by key, `history` a dictionary for each logged line, `folder` of the run's files."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def records(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    place, parts = HEADER, b""
    while place + RECORD <= len(content):
        room = BLOCK - place % BLOCK
        if room < RECORD:  # too little for a header: the rest of the block is padding
            place += room
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if kind == 0:
            return
        parts += content[place + RECORD : place + RECORD + length]
        place += RECORD + length
        if kind in (1, 4):
            yield parts
            parts = b""


def offline_run(folder: Path) -> OfflineRun:
    """The one run that was kept under `folder`."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    run = OfflineRun(file.parent)
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.config |= _values(record.run.config.update)
        elif kind == "config":
            run.config |= _values(record.config.update)
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "history":
            run.history.append(_values(record.history.item))
    return run


def _values(items: Any) -> dict[str, Any]:
    return {("/".join(item.nested_key) or item.key): json.loads(item.value_json) for item in items}
