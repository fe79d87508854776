"""An OpenAI-compatible chat address that answers with a tiny real model; it can fail as `FakeServer` can."""

from __future__ import annotations

from typing import Any

import torch
from other_tokens import other_model, other_tokenizer
from vllm_server.fake import Answer, FakeServer

MODEL = "org/writer-1"
PATH = "/v1/chat/completions"


class ChatStandIn(FakeServer):
    """Attributes beside those of `FakeServer`: `limit` is the name of the cap that it knows; `path` where it is."""

    def __init__(self, path: str = PATH, limit: str = "max_tokens") -> None:
        super().__init__(other_model(), other_tokenizer())
        self.path, self.limit = path, limit

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path != self.path:
            raise Answer(404, "Not Found")
        if body["model"] != MODEL:
            raise Answer(404, f"The model `{body['model']}` does not exist.")
        unknown = set(body) - {"model", "messages", self.limit, "temperature", "top_p"}
        if unknown:
            raise Answer(400, f"Unsupported parameter: {sorted(unknown)}. Use '{self.limit}' instead.")
        with self._lock, torch.no_grad():
            ids, ended = self.written(body["messages"], body[self.limit])
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}}
        choice["finish_reason"] = "stop" if ended else "length"
        return {"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": {}}

    def written(self, messages: list[dict[str, Any]], most: int) -> tuple[list[int], bool]:
        """The most likely ids for these messages, and whether the model ended them."""
        prompt = list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
        ids: list[int] = []
        while len(ids) < most:
            ids.append(int(self.base(torch.tensor([prompt + ids])).logits[0, -1, : len(self.tokenizer)].argmax()))
            if ids[-1] == 1 or len(ids) == len(prompt) % 7:  # some answers end, whatever the model would write
                return ids, True
        return ids, False
