"""An OpenAI-compatible chat address: messages in, text out.

The key comes from the environment (`OPENAI_API_KEY`) and goes into a header, nowhere else.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from gkd.common.redact import harmless
from gkd.servers.answers import first_choice
from gkd.servers.client import RefusedError, ServerError, VLLMClient

FIELD, KEY = "teacher_chat_url", "OPENAI_API_KEY"


class ChatServer:
    """A model behind a chat address.

    Args:
        url: as OpenAI's own client takes it, https://host/v1 say.
        model: its name there.
        timeout, proxy: as of `VLLMClient`.

    Raises:
        ValueError: what `VLLMClient` refuses; several addresses, or one with a user or a key in it.
    """

    def __init__(self, url: str, model: str, *, timeout: float, proxy: str | None = None) -> None:
        check_chat_url(url)
        self.client = VLLMClient(url, field=FIELD, timeout=timeout, proxy=proxy, key_name=KEY)
        self.model = model
        own = urlsplit(url.strip().rstrip("/")).path
        self.path = "/chat/completions" if own and not own.endswith("/v1") else "/v1/chat/completions"
        self._limit = "max_tokens"

    @property
    def name(self) -> str:
        return self.model

    @property
    def fingerprint(self) -> str:
        """What identifies the model as far as an address tells."""
        return f"chat:{self.model}"

    def answer(
        self, messages: Sequence[Mapping[str, Any]], most: int, options: Mapping[str, Any], stop: threading.Event
    ) -> tuple[str, bool]:
        """The text of an answer of at most `most` tokens, and whether the model ended it.

        Raises:
            ServerError: no answer in time, a refusal, or what is no answer.
        """
        payload = {"model": self.model, "messages": list(messages), **options}
        limit = self._limit
        try:
            body = self.client.post(self.path, {**payload, limit: most}, again=_fault_of, stop=stop)
        except RefusedError as error:
            other = "max_completion_tokens"  # models that think know only this name
            if limit == other or other not in error.reason:
                raise
            self._limit = other
            body = self.client.post(self.path, {**payload, other: most}, again=_fault_of, stop=stop)
        return _answer_of(body, self.client.urls[0] + self.path)


def check_chat_url(url: str) -> None:
    """Raises ValueError for several addresses, and for one with a user or a key in it, which is not shown."""
    if "@" in url:
        raise ValueError(
            f"{FIELD} holds an @, so a user's name or a key: a key comes from the environment variable {KEY} alone"
        )
    if "," in url:
        raise ValueError(f"{FIELD} holds several addresses: name one")


def _fault_of(body: Any) -> str | None:
    """A gateway's HTTP 200 with an error in it, which may pass."""
    if isinstance(body, dict) and body.get("error") and not body.get("choices"):
        error = body["error"]
        return harmless(error.get("message") if isinstance(error, dict) else error)[:500]
    return None


def _answer_of(body: Any, where: str) -> tuple[str, bool]:
    choice = first_choice(body)
    message = None if choice is None else choice.get("message")
    if choice is None or not isinstance(message, dict):
        raise ServerError(f"{where} answers no chat completion ({FIELD}): {harmless(repr(body)[:200])}")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise ServerError(f"{where} answers something else than text ({FIELD}): {harmless(repr(text)[:200])}")
    return text or "", choice.get("finish_reason") == "stop"
