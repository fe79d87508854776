"""HTTP to one or several `vllm serve` processes: what the rollout backend and the server teacher share.

vLLM itself is never imported: it lives in an environment of its own, on its own GPUs or machines. A server that is
slow, starts anew or fails for a while is asked again with growing pauses, up to a total time; then the run ends with
an error that names the address and the cause. A request that the server understood and refused is not repeated.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import unquote, urlsplit

import requests

from gkd.common.redact import REDACTED, harmless, redact_value
from gkd.servers.bounded_http import BoundedAdapter, TooLargeError, bounded_request

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0  # a host that does not answer the connection attempt within this is tried again
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds between attempts, doubled each time
_RETRY_STATUSES = frozenset({408, 425, 429, 502, 503, 504})  # HTTP statuses of a server that may answer later
_ATTEMPTS_AT_500 = 7  # about 6 s: longer than a dying engine takes to close its port, shorter than a fault's patience
ANSWER_BYTES = 16 << 20  # of an answer whose size the caller does not know
_REASON_BYTES = 1 << 16  # of a refusal, which is read for its reason
_SECRET_LENGTH = 8  # a shorter key ("EMPTY") is none, and words have as many letters
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
            i modulo their count, and to the next one when it fails. What stands before an @ goes into a header and
            nowhere else: `http://user:password@host` (basic), `http://token@host` (bearer).
        field: the configuration field they come from, for messages.
        timeout: seconds that one request may take in all, repetitions included.
        api_key: sent as a bearer token; None takes the environment variable `key_name`, where there is one.
        proxy: an HTTP proxy to reach them through. The environment's (http_proxy, ~/.netrc) is never used: it would
            be handed prompts and keys without being named.
        key_name: of the variable.
        gone: tells why no server will ever answer again, as far as can be seen from here; None while they may.

    Raises:
        ValueError: no address, or one that is not http(s)://host[:port]; a timeout that is not positive; a key that
            no header can hold.
    """

    def __init__(
        self,
        urls: str,
        *,
        field: str,
        timeout: float = 600.0,
        api_key: str | None = None,
        proxy: str | None = None,
        key_name: str = "VLLM_API_KEY",
        gone: Callable[[], str | None] = lambda: None,
    ) -> None:
        addresses = [_address(url, field, key_name) for url in urls.split(",") if url.strip()]
        self.urls = [url for url, _ in addresses]
        if not self.urls:
            raise ValueError(f"{field}={redact_value(urls)!r} holds no address: use http://host:port")
        if not timeout > 0:
            raise ValueError(f"rollout_server_timeout={timeout} must be above 0 seconds")
        self.field, self.timeout, self._gone = field, timeout, gone
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        self._session.headers["Accept-Encoding"] = "gzip"
        if proxy is not None:
            _address(proxy, "server_proxy")
            self._session.proxies = {"http": proxy, "https": proxy}
        self._session.mount("http://", BoundedAdapter(pool_maxsize=_IN_FLIGHT))
        self._session.mount("https://", BoundedAdapter(pool_maxsize=_IN_FLIGHT))
        key = (api_key or os.environ.get(key_name) or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{key_name} holds characters that no HTTP header can: set it to the server's key")
        own = {"Authorization": f"Bearer {key}"} if key else {}
        self._headers = {url: {"Authorization": given} if given else own for url, given in addresses}
        said = {header["Authorization"].split(" ", 1)[1] for header in self._headers.values() if header}
        self._secrets = sorted((secret for secret in said if len(secret) >= _SECRET_LENGTH), key=len, reverse=True)
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
        most: int = ANSWER_BYTES,
    ) -> Any:
        """The answer to one request, parsed when it is JSON, else as text. It may be anything: `gkd.servers.answers`
        looks at it.

        Args:
            first: number of the server to ask first.
            url: ask this server only.
            timeout: seconds in all, instead of the client's.
            again: a reason to ask again in spite of HTTP 200 (an aborted generation), or None.
            stop: set by another thread to give up between two attempts.
            most: bytes that the answer may have; a longer one is an error.

        Raises:
            RefusedError: the request was understood and refused.
            ServerError: no good answer in time.
        """
        return self._request(
            "POST",
            path,
            payload,
            only=url,
            timeout=timeout or self.timeout,
            first=first,
            again=again,
            stop=stop,
            most=most,
        )

    def get(self, path: str, url: str, timeout: float) -> Any:
        """The same for GET, from one server."""
        return self._request("GET", path, None, only=url, timeout=timeout)

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
        *,
        only: str | None,
        timeout: float,
        first: int = 0,
        again: Callable[[Any], str | None] = lambda _: None,
        stop: threading.Event | None = None,
        most: int = ANSWER_BYTES,
    ) -> Any:
        urls, stop = [only] if only else self.urls, stop or threading.Event()
        start, pause, attempt, faults = time.monotonic(), FIRST_PAUSE, 0, 0
        causes: dict[str, None] = {}  # in their order: the last attempt often only runs out of time
        while True:
            url = urls[(first + attempt) % len(urls)]
            left = max(timeout - (time.monotonic() - start), 0.001)
            try:
                answer, cause = self._once(method, url, path, payload, left, most)
            except TooLargeError:
                raise ServerError(
                    f"{url}{path} answers more than the {most / 1e6:.1f} MB that such an answer can have "
                    f"({self.field}): is a vLLM server there?"
                ) from None
            except requests.RequestException as error:
                answer, cause = None, _plain(error)
            if isinstance(cause, RefusedError):
                faults += cause.status == 500
                if cause.status != 500 or faults == _ATTEMPTS_AT_500:
                    raise cause
            asked = None if cause else again(answer)
            cause = cause or (asked and self._without_key(asked))
            if cause is None:
                return answer
            attempt += 1
            causes[str(cause)] = None
            spent = time.monotonic() - start
            if (reason := self._gone()) is not None:
                raise ServerError(f"{url}{path} gave no answer: {reason} ({self.field})")
            if spent + pause >= timeout or stop.is_set():
                raise ServerError(
                    f"{url}{path} gave no answer: {'; '.join([*causes][-3:])} "
                    f"({attempt} attempts in {spent:.1f} s; {self.field})"
                )
            self._warn(url, cause, pause)
            stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _once(
        self, method: str, url: str, path: str, payload: dict[str, Any] | None, left: float, most: int
    ) -> tuple[Any, str | RefusedError | None]:
        """One attempt: the answer, or why there is none."""
        options = {"json": payload, "headers": self._headers[url]}
        try:
            response, body = bounded_request(
                self._session, method, url + path, seconds=left, connect=CONNECT_SECONDS, size=most, **options
            )
        except ValueError as error:
            return None, f"the answer cannot be read: {harmless(error)}"
        status = response.status_code
        if status in _RETRY_STATUSES:
            return None, f"HTTP {status}: {self._without_key(_reason(response, body))}"
        if status != 200:
            return None, RefusedError(url, path, status, self._without_key(_reason(response, body)))
        if not response.headers.get("content-type", "").startswith("application/json"):
            return body.decode("utf-8", errors="replace"), None
        try:
            return json.loads(body), None
        except (ValueError, RecursionError):  # a number of 5,000 digits, and lists in lists in lists, are JSON, too
            return None, "the answer is not valid JSON"

    def _without_key(self, text: str) -> str:
        """What a server says, which may repeat the key that it was sent."""
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        return text

    def _warn(self, url: str, cause: object, pause: float) -> None:
        # Hundreds of requests fail at once when a server is down; a lost keep-alive connection is not worth a word.
        now = time.monotonic()
        if pause > 4 * FIRST_PAUSE and now - self._last_warning > 5:
            self._last_warning = now
            logger.warning("no answer from %s (%s): asking again, for up to %.0f s in all", url, cause, self.timeout)


def _address(url: str, field: str, key_name: str = "VLLM_API_KEY") -> tuple[str, str | None]:
    """The base address without credentials, and the header that they become, or None.

    Raises:
        ValueError: it is no address; the message shows no credentials.
    """
    url = url.strip().rstrip("/").removesuffix("/v1")
    plain = True
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        plain, parts, port = False, urlsplit(""), None
    plain = plain and parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
    if not plain or parts.query or parts.fragment or "@" in parts.path:
        shown = redact_value(url if "@" not in url else f"{REDACTED}@{url.rsplit('@', 1)[1]}")
        raise ValueError(
            f"{field}: {shown!r} is not an address: use http://host:port (a key belongs into the environment variable "
            f"{key_name}; of a user's name or password, write /, : and @ as %2F, %3A and %40)"
        )
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    clean = f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path}"
    if "@" not in parts.netloc:
        return clean, None
    user, password = unquote(parts.username or ""), parts.password
    if password is None:
        return clean, f"Bearer {user}"
    return clean, "Basic " + base64.b64encode(f"{user}:{unquote(password)}".encode()).decode()


def _reason(response: requests.Response, content: bytes) -> str:
    """What the server says about its refusal: vLLM's, FastAPI's or any proxy's way of putting it."""
    text = content[:_REASON_BYTES].decode("utf-8", errors="replace")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return harmless(text[:500].strip() or response.reason)
    if isinstance(body, dict):
        error = body.get("error")
        body = (error.get("message") if isinstance(error, dict) else error) or body.get("message") or body
        if isinstance(body, dict):
            body = body.get("detail") or body
    return harmless(body if isinstance(body, str) else text[:500])[:500]


def _plain(error: BaseException) -> str:
    """The innermost reason of a chain of wrapped connection errors, which is the one that helps."""
    if isinstance(error, requests.Timeout):
        return "it timed out"
    inner: Any = error
    while True:
        deeper = getattr(inner, "reason", None) or next((a for a in inner.args if isinstance(a, BaseException)), None)
        if not isinstance(deeper, BaseException):
            return harmless(f"{type(inner).__name__}: {inner}")
        inner = deeper
