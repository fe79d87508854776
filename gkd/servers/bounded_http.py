"""HTTP answers within a deadline and a size, whatever the other end does.

`requests` bounds the time between two bytes and nothing else: a peer that sends one byte a second is waited for for
ever, one that never stops fills the memory. Here every read of a socket, of headers too, is given what is left of the
deadline and counted; what is compressed is unpacked no further than the bound.
"""

from __future__ import annotations

import http.client
import io
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

_PIECE = 1 << 16
_HEADERS = 1 << 18  # bytes that the head of an answer may take beside its body


class TooLargeError(OSError):
    """The peer sends more than it may."""


@dataclass
class Budget:
    """What is left for one answer: the moment at which it must be there, and bytes."""

    deadline: float
    size: int

    def seconds(self) -> float:
        """Raises TimeoutError when there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def spend(self, size: int) -> None:
        self.size -= size
        if self.size < 0:
            raise TooLargeError("the answer is larger than it may be")


_present = threading.local()


@contextmanager
def _within(budget: Budget) -> Iterator[None]:
    _present.budget = budget
    try:
        yield
    finally:
        _present.budget = None


class _Reader(io.RawIOBase):
    """A socket's file whose every read is bounded by the budget of the request it belongs to."""

    def __init__(self, sock: Any, raw: Any, budget: Budget) -> None:
        self._sock, self._raw, self._budget = sock, raw, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._budget.seconds())
        count: int | None = self._raw.readinto(buffer)
        self._budget.spend(count or 0)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        budget = getattr(_present, "budget", None)
        if budget is not None:
            raw: Any = self.fp.detach()  # nothing has been read yet
            self.fp = io.BufferedReader(_Reader(sock, raw, budget))


class _Plain(HTTPConnection):
    response_class = _Answer


class _Secure(HTTPSConnection):
    response_class = _Answer


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _Secure


class BoundedAdapter(HTTPAdapter):
    """Mount it on a `requests.Session`, and ask with `bounded_request`."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._bound(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return self._bound(super().proxy_manager_for(proxy, **kwargs))

    def _bound(self, manager: Any) -> Any:
        manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}
        return manager


def bounded_request(
    session: requests.Session, method: str, url: str, *, seconds: float, connect: float, size: int, **options: Any
) -> tuple[requests.Response, bytes]:
    """The answer and its body, unpacked.

    Args:
        seconds: for all of it, from the connection to the last byte.
        connect: of them, at most so many for the connection.
        size: bytes that the body may have, packed and unpacked.
        options: of `Session.request`.

    Raises:
        requests.RequestException: no connection, a connection that broke, a deadline that passed.
        TooLargeError: a larger answer.
        ValueError: a body that cannot be unpacked.
    """
    budget = Budget(time.monotonic() + seconds, size + _HEADERS)
    with _within(budget):
        try:
            response = session.request(
                method,
                url,
                timeout=(min(connect, seconds), seconds),
                stream=True,
                allow_redirects=False,
                **options,
            )
            with response:
                pieces = response.raw.stream(_PIECE, decode_content=False)
                return response, _unpacked(pieces, response.headers.get("content-encoding", ""), size)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if budget.size < 0:  # on its way through the libraries the cause was wrapped
                raise TooLargeError("the answer is larger than it may be") from error
            if isinstance(error, urllib3.exceptions.TimeoutError):
                raise requests.ReadTimeout(str(error)) from error
            if isinstance(error, urllib3.exceptions.HTTPError):
                raise requests.ConnectionError(error) from error
            raise


def _unpacked(pieces: Iterator[bytes], encoding: str, size: int) -> bytes:
    body = bytearray()
    packed = [word for word in encoding.lower().replace(" ", "").split(",") if word not in ("", "identity")]
    if packed and packed not in (["gzip"], ["x-gzip"], ["deflate"]):
        raise ValueError(f"it is packed as {encoding[:40]!r}, which was not asked for")
    unpacker: Any = zlib.decompressobj(47) if packed else None  # 47: gzip or zlib, whichever its head says
    for piece in pieces:
        try:
            body += piece if unpacker is None else unpacker.decompress(piece, size + 1 - len(body))
        except zlib.error as error:
            raise ValueError(f"it cannot be unpacked ({error})") from error
        if len(body) > size:
            raise TooLargeError("the answer is larger than it may be")
    if unpacker is not None and not unpacker.eof:
        raise ValueError("what is packed in it ends too early")
    return bytes(body)
