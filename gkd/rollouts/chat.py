"""Completions from an OpenAI-compatible chat address, as bytes (`gkd.data.message_bytes`).

Such an address promises no random numbers, so what is to be the same in every run is kept on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gkd.data.message_bytes import END, bytes_of, messages_of
from gkd.rollouts.adapter_upload import agree
from gkd.rollouts.base import Rollout, RolloutOrder, SamplingSettings
from gkd.servers.chat import FIELD, ChatServer
from gkd.servers.client import ServerError


class ChatRollout(Rollout):
    """Asks for one answer to each prompt, many at a time.

    Args:
        server: the address and its model.
        settings: of which such an address takes max_new_tokens (in its own tokens), temperature and top_p.
        accelerator: to agree with the other ranks; None is one process.
    """

    server_field = FIELD

    def __init__(self, server: ChatServer, settings: SamplingSettings, accelerator: Any = None) -> None:
        super().__init__(settings)
        self.server, self.accelerator = server, accelerator

    @classmethod
    def of(cls, order: RolloutOrder) -> ChatRollout:
        return cls(order.server, order.settings, order.accelerator)

    def generate(
        self, prompts: list[list[int]], step: int, rows: list[int] | None = None, teachers: list[int] | None = None
    ) -> list[list[int]]:
        """One answer to each prompt; see `Rollout.generate`. Every rank must call this.

        Raises:
            ServerError: the address stayed out of reach, refused, or answered what is no answer. All ranks raise it.
        """
        rows, failure = self._numbered(prompts, rows), None
        answers: list[list[int]] = []
        try:
            self._check_prompts(prompts, step, rows)
            answers = self.server.client.run_all([self._call(prompt) for prompt in prompts])
        except (ServerError, ValueError) as error:
            failure = error
        agree(self.accelerator, None, failure)
        return answers

    def _call(self, prompt: list[int]) -> Callable[[threading.Event], list[int]]:
        settings = self.settings
        options = {"temperature": settings.temperature} | ({} if settings.top_p == 1 else {"top_p": settings.top_p})

        def call(stop: threading.Event) -> list[int]:
            text, ended = self.server.answer(messages_of(prompt), settings.max_new_tokens, options, stop)
            return [*bytes_of(text), END] if ended else bytes_of(text)

        return call
