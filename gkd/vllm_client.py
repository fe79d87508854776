"""HTTP to one or several `vllm serve` processes: what the rollout backend and the server teacher share.

vLLM itself is never imported: it lives in an environment of its own, on its own GPUs or machines. A server that is
slow, starts anew or fails for a while is asked again with growing pauses, up to a total time; then the run ends with
an error that names the address and the cause. A request that the server understood and refused is not repeated.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0  # a host that does not answer the connection attempt within this is tried again
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds between attempts, doubled each time
_AGAIN = frozenset({408, 425, 429, 502, 503, 504})  # HTTP statuses of a server that may answer later
_ATTEMPTS_AT_500 = 7  # about 6 s: longer than a dying engine takes to close its port, shorter than a fault's patience
_IN_FLIGHT = 256  # requests at a time and server; what a server cannot take at once it queues


class ServerError(RuntimeError):
    """A server that stays out of reach, keeps failing, or answers nonsense.

    `on_all_ranks` says that every rank raises it at this point, so that all may still do something together.
    """

    on_all_ranks = False


class RefusedError(ServerError):
    """The server understood the request and said no (HTTP 4xx, or a 500 that repeats)."""

    def __init__(self, url: str, path: str, status: int, reason: str) -> None:
        super().__init__(f"{url}{path} answers HTTP {status}: {reason}")
        self.url, self.status, self.reason = url, status, reason


class VLLMClient:
    """Sends requests to the servers in turn, many at a time, and again when they fail.

    Args:
        urls: base addresses, comma separated, such as `http://host:8000`; with several, request i goes to number
            i modulo their count, and to the next one when it fails.
        field: the configuration field they come from, for messages.
        timeout: seconds that one request may take in all, repetitions included.
        api_key: sent as a bearer token; None takes the environment variable VLLM_API_KEY, where there is one.

    Raises:
        ValueError: no address, or one that is not http(s)://host[:port]; a timeout that is not positive.
    """

    def __init__(self, urls: str, *, field: str, timeout: float = 600.0, api_key: str | None = None) -> None:
        self.urls = [_checked(url, field) for url in urls.split(",") if url.strip()]
        if not self.urls:
            raise ValueError(f"{field}={urls!r} holds no address: use http://host:port")
        if not timeout > 0:
            raise ValueError(f"rollout_server_timeout={timeout} must be above 0 seconds")
        self.field, self.timeout = field, timeout
        self._session = requests.Session()
        self._session.mount("http://", HTTPAdapter(pool_maxsize=_IN_FLIGHT))
        self._session.mount("https://", HTTPAdapter(pool_maxsize=_IN_FLIGHT))
        key = api_key or os.environ.get("VLLM_API_KEY")
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"
        self._last_warning = float("-inf")

    # ------------------------------------------------------------------------------------------------ requests

    def post(
        self,
        path: str,
        payload: dict[str, Any],
        *,
        first: int = 0,
        url: str | None = None,
        timeout: float | None = None,
        again: Callable[[Any], str | None] = lambda _: None,
        stop: threading.Event | None = None,
    ) -> Any:
        """The answer to one request, parsed when it is JSON, else as text.

        Args:
            first: number of the server to ask first.
            url: ask this server only.
            timeout: seconds in all, instead of the client's.
            again: a reason to ask again in spite of HTTP 200 (an aborted generation), or None.
            stop: set by another thread to give up between two attempts.

        Raises:
            RefusedError: the request was understood and refused.
            ServerError: no good answer in time.
        """
        return self._request(
            "POST", path, payload, first, url, timeout or self.timeout, again, stop or threading.Event()
        )

    def get(self, path: str, url: str, timeout: float) -> Any:
        """The same for GET, from one server."""
        return self._request("GET", path, None, 0, url, timeout, lambda _: None, threading.Event())

    def run_all(
        self, calls: Sequence[Callable[[threading.Event], Any]], stop: threading.Event | None = None
    ) -> list[Any]:
        """Run calls at the same time, in threads; results in their order. The first failure ends the others' waiting.

        A call is given the event that says so, to pass on as `stop`; the caller may set it, too.
        """
        if not calls:
            return []
        stop = stop or threading.Event()
        with ThreadPoolExecutor(min(len(calls), _IN_FLIGHT * len(self.urls))) as pool:
            futures = [pool.submit(call, stop) for call in calls]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises the failure, if that is what ended the wait
            finally:
                stop.set()
                for future in futures:
                    future.cancel()
            return [future.result() for future in futures]

    def _request(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None,
        first: int,
        only: str | None,
        timeout: float,
        again: Callable[[Any], str | None],
        stop: threading.Event,
    ) -> Any:
        urls = [only] if only else self.urls
        start, pause, attempt, faults = time.monotonic(), FIRST_PAUSE, 0, 0
        causes: dict[str, None] = {}  # in their order: the last attempt often only runs out of time
        while True:
            url = urls[(first + attempt) % len(urls)]
            left = max(timeout - (time.monotonic() - start), 0.001)
            try:
                answer, cause = self._once(method, url, path, payload, left)
            except requests.RequestException as error:
                answer, cause = None, _plain(error)
            if isinstance(cause, RefusedError):
                faults += cause.status == 500
                if cause.status != 500 or faults == _ATTEMPTS_AT_500:
                    raise cause
            cause = cause or again(answer)
            if cause is None:
                return answer
            attempt += 1
            causes[str(cause)] = None
            spent = time.monotonic() - start
            if spent + pause >= timeout or stop.is_set():
                raise ServerError(
                    f"{url}{path} gave no answer: {'; '.join([*causes][-3:])} "
                    f"({attempt} attempts in {spent:.1f} s; {self.field})"
                )
            self._warn(url, cause, pause)
            stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _once(
        self, method: str, url: str, path: str, payload: dict[str, Any] | None, left: float
    ) -> tuple[Any, str | RefusedError | None]:
        """One attempt: the answer, or why there is none."""
        response = self._session.request(
            method, url + path, json=payload, timeout=(min(CONNECT_SECONDS, left), left), allow_redirects=False
        )
        if response.status_code in _AGAIN:
            return None, f"HTTP {response.status_code}: {_reason(response)}"
        if response.status_code != 200:
            return None, RefusedError(url, path, response.status_code, _reason(response))
        if not response.headers.get("content-type", "").startswith("application/json"):
            return response.text, None
        try:
            return response.json(), None
        except requests.JSONDecodeError:
            return None, "the answer is not valid JSON"

    def _warn(self, url: str, cause: object, pause: float) -> None:
        # Hundreds of requests fail at once when a server is down; a lost keep-alive connection is not worth a word.
        now = time.monotonic()
        if pause > 4 * FIRST_PAUSE and now - self._last_warning > 5:
            self._last_warning = now
            logger.warning("no answer from %s (%s): asking again, for up to %.0f s in all", url, cause, self.timeout)


def _checked(url: str, field: str) -> str:
    url = url.strip().rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{field}: {url!r} is not an address: use http://host:port")
    return url


def _reason(response: requests.Response) -> str:
    """What the server says about its refusal: vLLM's, FastAPI's or any proxy's way of putting it."""
    try:
        body = response.json()
    except requests.JSONDecodeError:
        return response.text[:500].strip() or response.reason
    if isinstance(body, dict):
        error = body.get("error")
        body = (error.get("message") if isinstance(error, dict) else error) or body.get("message") or body
        if isinstance(body, dict):
            body = body.get("detail") or body
    return str(body)[:500]


def _plain(error: BaseException) -> str:
    """The innermost reason of a chain of wrapped connection errors, which is the one that helps."""
    if isinstance(error, requests.Timeout):
        return "it timed out"
    inner: Any = error
    while True:
        deeper = getattr(inner, "reason", None) or next((a for a in inner.args if isinstance(a, BaseException)), None)
        if not isinstance(deeper, BaseException):
            return f"{type(inner).__name__}: {inner}"
        inner = deeper
