"""The teacher's last hidden states on disk, found again by the hash of a sequence and of its targets.

A store is a folder of safetensors files. Each process collects rows in memory and writes them as a file of its own, a
shard (`rows-*.safetensors`): to a temporary name, synchronised, then renamed, so a shard is whole or it is not there.
A shard holds the rows one behind the other, [tokens, Dt] in the dtype that the teacher gave, with each row's key, end
and CRC-32. It is memory-mapped: a row that is asked for is read, checked and copied, the others stay on disk. A
damaged shard is warned of, deleted, and its rows are simply not there any more.

`head.safetensors` is the teacher's output head, with which the states become logits; `about.json` says for humans what
they are. The folder's name is a hash of all that they depend on beside the sequence (`open_scores`).

Dt hidden size of the teacher, n targets of a row.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gkd.common.disk import replacing
from gkd.common.errors import DiskFullError
from gkd.common.keyed_folder import digest, open_folder, own_file_name
from gkd.loss.signals import Head

logger = logging.getLogger(__name__)

FORMAT = 1
WHAT = "what the teacher said"  # in errors of a full disk
REMEDY = "What was kept before is untouched: make room, or name another place with teacher_scores_dir"
SHARD_BYTES = 64 << 20  # collected in memory before they are written
SHARD_SECONDS = 300.0  # so much work is lost at most when a process is killed
ROOM = 256 << 20  # left free on the disk: a checkpoint that finds no room costs more than scores that are not kept
_OPEN = 64  # shards that are mapped at a time
_LEFT_BEHIND = 24 * 3600.0  # seconds; a temporary file of that age has no writer any more
_HEAD = "head.safetensors"


def row_key(input_ids: Sequence[int], labels: Sequence[int]) -> bytes:
    """16 bytes for a row: its token ids, and which of them are targets (labels other than -100). No padding."""
    targets = [t for t in range(1, len(labels)) if labels[t] != -100]
    numbers = array("q", [len(input_ids), *input_ids, *targets])
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()


def open_scores(folder: str | Path, key: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> ScoreStore:
    """The store of everything that was scored under `key`, below `folder`.

    Args:
        folder: holds one store per key.
        key: all that hidden states depend on beside the sequence. Another key is another store.
        notes: written beside it for humans; decides nothing.

    Raises:
        ValueError: the folder is not there and cannot be made.
        DiskFullError: not even that has room.
    """
    name = digest({"format": FORMAT, **key})
    path = Path(folder).expanduser() / name[:16]
    unusable = (
        f"teacher_scores_dir={str(folder)!r} cannot be made or read ({{reason}}): name a folder that can be written to"
    )
    open_folder(path, {"key": dict(key), "notes": dict(notes or {})}, WHAT, REMEDY, unusable)
    return ScoreStore(path, name)


class ScoreStore:
    """Hidden states [n, Dt] by row, in one folder. Use `open_scores`.

    Ranks and runs may share it. What others have written is seen after `refresh`.

    Attributes:
        writable: rows can be added; otherwise `add` does nothing.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self.writable = os.access(path, os.W_OK)
        self._places: dict[bytes, tuple[str, int, int, int]] = {}  # shard, first token, end, CRC-32
        self._seen: set[str] = set()
        self._mapped: OrderedDict[str, Any] = OrderedDict()
        self._pending: dict[bytes, Tensor] = {}
        self._pending_bytes, self._pending_since = 0, 0.0
        if not self.writable:
            logger.warning("%s cannot be written to: the scores that are there are used, none are added", path)
        self._clean()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    def __contains__(self, key: object) -> bool:
        return key in self._pending or key in self._places

    def get(self, key: bytes) -> Tensor | None:
        """The states of a row, in CPU memory; None when they are not there, or turn out to be damaged."""
        if key in self._pending:
            return self._pending[key]
        if key not in self._places:
            return None
        shard, start, end, total = self._places[key]
        try:
            row: Tensor = self._open(shard)[start:end].clone()
        except (SafetensorError, OSError, ValueError) as error:
            self._forget(shard, str(error))
            return None
        if _sum_of(row) != total:
            self._forget(shard, "a row does not match its checksum")
            return None
        return row

    def add(self, rows: Mapping[bytes, Tensor]) -> None:
        """Keep rows [n, Dt]: in memory first, on disk once there are enough of them, or `flush`. The rows of one call
        always end up in one shard.

        Raises:
            DiskFullError: there is no space left for them.
        """
        if not self.writable:
            return
        if not self._pending:
            self._pending_since = time.monotonic()
        for key, row in rows.items():
            if key not in self:
                assert row.dim() == 2, row.shape
                self._pending[key] = row.detach().to("cpu", copy=True).contiguous()
                self._pending_bytes += self._pending[key].nbytes
        if self._pending_bytes >= SHARD_BYTES or time.monotonic() - self._pending_since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory only.

        Raises:
            DiskFullError: there is no space left; the rows are given up.
        """
        if not self._pending:
            return
        pending, size = self._pending, self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
        name = f"rows-{own_file_name()}.safetensors"
        free = shutil.disk_usage(self.path).free
        if free < size + ROOM:
            raise DiskFullError(
                errno.ENOSPC,
                f"{free / 1e9:.2f} GB are free, and {ROOM / 1e9:.2f} GB of them stay so. {REMEDY}",
                str(self.path),
            )
        places, tensors, total = _shard_of(name, pending)
        form = str([str(tensors["hidden"].dtype), list(tensors["hidden"].shape)])
        with replacing(self.path / name, WHAT, REMEDY) as temporary:
            save_file(tensors, temporary, metadata={"store": self.key, "sum": str(total), "form": form})
        self._seen.add(name)
        self._places.update(places)

    def refresh(self) -> None:
        """Look for what others have written since the last time."""
        for path in sorted(self.path.glob("rows-*.safetensors")):
            if path.name not in self._seen:
                self._read(path)

    def _read(self, path: Path) -> None:
        self._seen.add(path.name)
        try:
            if not path.is_file():  # a pipe would be waited for
                raise IsADirectoryError(errno.EISDIR, "it is no file")
            path.open("rb").close()  # safetensors calls a file that may not be read one that is not there
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                keys, ends, sums = (file.get_tensor(name) for name in ("keys", "ends", "sums"))
                form = _form_of(file.get_slice("hidden"))
            if about.get("store") != self.key or about.get("sum") != str(_sum_of(keys, ends, sums)):
                raise ValueError("its list of rows does not match its checksum")
            if about.get("form", form) != form:
                raise ValueError("its states have another form than those that were written")
        except FileNotFoundError:
            return
        except OSError as error:  # not damage: somebody else's file, perhaps
            logger.warning("%s cannot be read (%s): its rows are scored again", path, error.strerror or error)
            return
        except (SafetensorError, ValueError) as error:
            self._forget(path.name, str(error))
            return
        start = 0
        for key, end, total in zip(keys.numpy(), ends.tolist(), sums.tolist(), strict=True):
            self._places.setdefault(key.tobytes(), (path.name, start, end, total))
            start = end

    def _open(self, shard: str) -> Any:
        if shard not in self._mapped:
            self._mapped[shard] = safe_open(self.path / shard, "pt").get_slice("hidden")
        self._mapped.move_to_end(shard)
        if len(self._mapped) > _OPEN:
            self._mapped.popitem(last=False)
        return self._mapped[shard]

    def _forget(self, shard: str, why: str) -> None:
        """A shard that cannot be used: its rows are not there any more, and will be scored and written anew."""
        logger.warning("%s is damaged (%s): its rows are scored again", self.path / shard, why)
        self._places = {key: place for key, place in self._places.items() if place[0] != shard}
        self._mapped.pop(shard, None)
        if self.writable:
            with contextlib.suppress(OSError):
                (self.path / shard).unlink(missing_ok=True)

    def _clean(self) -> None:
        """Delete temporary files that a killed process has left behind."""
        for path in self.path.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND:
                    path.unlink()

    # ------------------------------------------------------------------------------------------------- the head

    def has_head(self) -> bool:
        return (self.path / _HEAD).exists()

    def write_head(self, head: Head) -> None:
        """Keep the teacher's output head, whole (under ZeRO-3: gathered).

        Raises:
            DiskFullError: there is no space left for it.
        """
        tensors = {"weight": head.weight, "bias": head.bias}
        kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
        numbers = json.dumps({"logit_scale": head.logit_scale, "softcap": head.softcap})
        about = {"store": self.key, "numbers": numbers, "sum": str(_sum_of(*kept.values()))}
        about["form"] = _form_of_head(kept, numbers)
        with replacing(self.path / _HEAD, WHAT, REMEDY) as temporary:
            save_file(kept, temporary, metadata=about)

    def read_head(self, device: torch.device | str = "cpu") -> Head | None:
        """The head as `write_head` got it; None when there is none, or a damaged one."""
        path = self.path / _HEAD
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise ValueError("it is no file")
            path.open("rb").close()
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys(), reverse=True)}
            numbers = json.loads(about["numbers"])
            if about.get("store") != self.key or about["sum"] != str(_sum_of(*tensors.values())):
                raise ValueError("it does not match its checksum")
            if about["form"] != _form_of_head(tensors, about["numbers"]):
                raise ValueError("its numbers or shapes do not match their checksum")
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
            return Head(moved["weight"], moved.get("bias"), **numbers)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): it is written anew", path, error)
            return None


def _form_of(part: Any) -> str:
    """dtype and shape of a tensor of a safetensors file: a bit of its head makes bf16 of fp16, with the same bytes."""
    return str([str(part[0:0].dtype), list(part.get_shape())])


def _form_of_head(tensors: Mapping[str, Tensor], numbers: str) -> str:
    form = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())}
    return str(zlib.crc32(json.dumps([form, numbers]).encode()))


def _shard_of(
    name: str, rows: Mapping[bytes, Tensor]
) -> tuple[dict[bytes, tuple[str, int, int, int]], dict[str, Tensor], int]:
    """Where each row will be, the tensors of the file, and the checksum of its list of rows."""
    places, end = {}, 0
    for key, row in rows.items():
        places[key] = (name, end, end + len(row), _sum_of(row))
        end += len(row)
    keys = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
    ends = torch.tensor([place[2] for place in places.values()])
    sums = torch.tensor([place[3] for place in places.values()])
    tensors = {"hidden": torch.cat(list(rows.values())), "keys": keys, "ends": ends, "sums": sums}
    return places, tensors, _sum_of(keys, ends, sums)


def _sum_of(*tensors: Tensor) -> int:
    """The CRC-32 of the bytes of tensors in CPU memory."""
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, total)
    return total
