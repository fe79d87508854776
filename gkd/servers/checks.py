"""What is asked of a vLLM server before the first step: which model, which tokenizer, how long a sequence."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gkd.servers.answers import ServedModel, served_model_of, tokens_of
from gkd.servers.client import RefusedError, ServerError, VLLMClient

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # most time for a check: a wrong address should not take the whole timeout to show
_SAMPLE = "The 3 quick foxes\n\tcan't jump: naïve Ωmega, 東京 ☂ = 12345.67; "


def served_model(client: VLLMClient) -> ServedModel:
    """The base model, which all servers must have in common; adapters are left out.

    Raises:
        ValueError: a server is out of reach, refuses, or serves something else than the first one.
    """
    found = [_served_by(client, url) for url in client.urls]
    for url, model in zip(client.urls, found, strict=True):
        if model != found[0]:
            raise ValueError(
                f"{client.field}: {client.urls[0]} serves {found[0]} but {url} serves {model}: give servers that "
                "were started alike"
            )
    return found[0]


def _served_by(client: VLLMClient, url: str) -> ServedModel:
    try:
        body = client.get("/v1/models", url, min(client.timeout, START_SECONDS))
    except ServerError as error:
        raise ValueError(
            f"{client.field}={url!r} cannot be used: {error}. Start `vllm serve` there, or look at its log"
        ) from error
    try:
        return served_model_of(body)
    except ServerError as error:
        raise ValueError(
            f"{client.field}={url!r} does not answer /v1/models as a vLLM server does: {error}"
        ) from error


def check_tokenizer(client: VLLMClient, model: ServedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare what server and tokenizer make of a line of text followed by all special tokens.

    A server without a tokenizer (--skip-tokenizer-init) has nothing to compare.

    Raises:
        ValueError: the ids differ.
    """
    text = _SAMPLE + "".join(str(token) for token in tokenizer.all_special_tokens)
    ours = tokenizer(text, add_special_tokens=False)["input_ids"]
    payload = {"model": model.name, "prompt": text, "add_special_tokens": False}
    for url in client.urls:
        try:
            theirs = tokens_of(client.post("/tokenize", payload, url=url, timeout=min(client.timeout, START_SECONDS)))
        except RefusedError as error:
            logger.info("the tokenizer of %s cannot be compared: %s", url, error)
            continue
        except ServerError as error:
            raise ValueError(f"{client.field}={url!r} cannot be used, it does not tokenize: {error}") from error
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            raise ValueError(
                f"{client.field}={url!r} serves {model.name!r} with another tokenizer: {text!r} is {len(ours)} ids "
                f"here and {len(theirs)} there, different from id {at} on. Serve a model of the student's family, or "
                "pass the tokenizer that belongs to it"
            )


def check_length(client: VLLMClient, model: ServedModel, needed: int | None) -> None:
    """Compare the longest sequence there may be (None: unknown) with what the server takes.

    Raises:
        ValueError: it does not fit.
    """
    if needed is not None and model.max_model_len is not None and needed > model.max_model_len:
        raise ValueError(
            f"{client.field}: sequences of up to {needed} tokens do not fit into max_model_len={model.max_model_len} "
            f"of {client.urls[0]}: start it with --max-model-len {needed}, or lower max_length, max_prompt_length or "
            "max_new_tokens"
        )


@dataclass(frozen=True)
class Server:
    """A connection that has been checked, and the base model at its other end."""

    client: VLLMClient
    served: ServedModel

    @property
    def name(self) -> str:
        return self.served.root

    @property
    def fingerprint(self) -> str:
        """What identifies the model as far as a server tells; the weights it does not show."""
        return f"vllm:{self.served.root}"
