"""What vLLM servers answer, one function per kind of answer: what is needed of it, checked, or a ServerError.

Nothing of an answer is used that was not looked at here: a proxy's page, a number where ids should be, a token that no
vocabulary has, a NaN. Python's own idea of equality is not enough for that: True == 1 and 65.0 == 65.

Shapes: K top-k.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gkd.common.redact import harmless
from gkd.servers.client import ServerError

MOST_ABOVE_ONE = 1e-3  # by how much rounding may lift a probability, or the sum of K, above 1
Entry = Mapping[str, Any]  # vLLM's scores of one position: token id, as text -> {"logprob": ...}


@dataclass(frozen=True)
class ServedModel:
    """The base model of the servers: the name to ask for, where it was loaded from, and its longest sequence."""

    name: str
    root: str
    max_model_len: int | None


@dataclass(frozen=True)
class Completion:
    """Sampled ids, and what the server says of them: their log-probabilities (of the model, at temperature 1, before
    any rule of the sampling; None when they were not asked for) and why it stopped."""

    ids: list[int]
    log_probs: list[float] | None
    finish_reason: str


def served_model_of(body: Any) -> ServedModel:
    """The base model of /v1/models; a model served under several names has several entries, the first counts."""
    cards = _list(_field(body, "data"), "data")
    bases = [card for card in cards if not _field(card, "parent", None)]
    if not bases:
        raise ServerError(f"it serves no base model: {_describe(cards)}")
    name, root = _field(bases[0], "id"), _field(bases[0], "root", None)
    longest = _field(bases[0], "max_model_len", None)
    if not isinstance(name, str) or not name:
        raise ServerError(f"a model is called {_describe(name)}, which is no name")
    if not (root is None or isinstance(root, str)):
        raise ServerError(f"the root of {name!r} is {_describe(root)}, which is no path")
    if not (longest is None or (_is_whole(longest) and longest > 0)):
        raise ServerError(f"max_model_len is {_describe(longest)}, which is no length")
    return ServedModel(name, root or name, longest)


def tokens_of(body: Any) -> list[int]:
    """The ids of /tokenize."""
    return _ids(_field(body, "tokens"), "tokens")


def first_choice(body: Any) -> dict[str, Any] | None:
    """The first of an answer's `choices`; None where there is none."""
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, dict) else None


def is_unfinished(body: Any) -> str | None:
    """Why a completion is to be asked for again: a server that shuts down answers what it has. None: it is not."""
    choice = first_choice(body)
    reason = None if choice is None else choice.get("finish_reason")
    return (
        f"finish_reason={_describe(reason)}" if isinstance(reason, str) and reason not in ("stop", "length") else None
    )


def completions_of(
    body: Any, model: str, prompt: Sequence[int], *, log_probs: bool, number: int = 1
) -> list[Completion]:
    """The completions of /v1/completions, which must be the asked model's, of the prompt that was sent.

    Args:
        log_probs: they were asked for. number: of completions that were asked for.
    """
    _check_model(_field(body, "model", None), model)
    choices = _list(_field(body, "choices"), "choices")
    asked = "one was" if number == 1 else f"{number} were"
    if len(choices) != number:
        raise ServerError(f"{len(choices)} choices, where {asked} asked for")
    found: dict[int, Completion] = {}
    for choice in choices:
        index = _field(choice, "index", 0)
        if not _is_whole(index) or not 0 <= index < number or index in found:
            raise ServerError(f"the choice with index {_describe(index)}, where {asked} asked for")
        found[index] = _completion(choice, prompt, log_probs)
    return [found[index] for index in range(number)]


def _completion(choice: Any, prompt: Sequence[int], log_probs: bool) -> Completion:
    reason = _field(choice, "finish_reason", None)
    if not isinstance(reason, str):
        raise ServerError(f"finish_reason={_describe(reason)}")
    if _field(choice, "token_ids", None) is None or _field(choice, "prompt_token_ids", None) is None:
        raise ServerError("no token_ids and prompt_token_ids: it needs vLLM 0.10.2 or newer")
    ids = _ids(_field(choice, "token_ids"), "token_ids")
    if _ids(_field(choice, "prompt_token_ids"), "prompt_token_ids") != list(prompt):
        raise ServerError("a completion of another prompt")
    return Completion(ids, _log_probs(choice, len(ids)) if log_probs else None, reason)


def _log_probs(choice: Any, number: int) -> list[float]:
    values = _list(_field(_field(choice, "logprobs"), "token_logprobs"), "token_logprobs")
    if len(values) != number:
        raise ServerError(f"{len(values)} log-probabilities for {number} tokens")
    return [_log_prob(value, f"token {place}") for place, value in enumerate(values)]


def prompt_scores_of(body: Any, model: str, ids: Sequence[int]) -> list[Entry]:
    """The scores of each position of a sequence, of /inference/v1/generate or /v1/completions; the first is empty.
    Each must say something of the sequence's own token, which shows that entry and position belong together."""
    _check_model(_field(body, "model", model), model)  # not every version says it at both addresses
    scores = _field(body, "prompt_logprobs", None)
    if scores is None:
        choices = _list(_field(body, "choices", None), "choices")
        scores = _field(choices[0], "prompt_logprobs", None) if choices else None
    if not isinstance(scores, list):
        raise ServerError(f"the answer holds no prompt_logprobs ({_describe(scores)})")
    if len(scores) != len(ids):
        raise ServerError(f"{len(scores)} positions for {len(ids)} tokens")
    places = range(1, len(ids))
    return [{}, *(_entry(scores[place], place, ids[place]) for place in places)]


def _entry(entry: Any, place: int, token: int) -> Entry:
    if not isinstance(entry, dict) or str(token) not in entry:
        raise ServerError(f"token {token} at position {place} is missing from its scores")
    return entry


def own_score(entry: Entry, place: int, token: int) -> float:
    """The log-probability of the sequence's own token."""
    return _log_prob(_field(entry[str(token)], "logprob"), f"position {place}")


def top_scores(entry: Entry, place: int, k: int, vocabulary: int | None) -> tuple[list[int], list[float]]:
    """The K most likely tokens of a position, most likely first; an entry holds K tokens, and the sequence's own when
    it is not among them.

    Args:
        vocabulary: ids from here on are an error; None allows all.
    """
    where = f"position {place}"
    found = {_id_of(text, where): _log_prob(_field(value, "logprob"), where) for text, value in entry.items()}
    ranked = sorted(((value, token) for token, value in found.items()), reverse=True)[:k]
    if len(ranked) < k:
        raise ServerError(f"{where} has {len(ranked)} scores, not teacher_top_k={k}")
    mass = math.fsum(math.exp(value) for value, _ in ranked)
    if mass > 1 + MOST_ABOVE_ONE:
        raise ServerError(f"{where}: {mass} is not the mass of {k} probabilities")
    foreign = max(token for _, token in ranked)
    if vocabulary is not None and foreign >= vocabulary:
        raise ServerError(f"{where}: token {foreign}, where the vocabulary has {vocabulary}")
    return [token for _, token in ranked], [value for value, _ in ranked]


# ----------------------------------------------------------------------------------------------------- pieces

_REQUIRED: Any = object()


def _check_model(answered: Any, asked: str) -> None:
    if answered != asked:
        raise ServerError(
            f"asked for {asked!r}, the answer is from {_describe(answered)}; is there a proxy in between?"
        )


_SHORT = reprlib.Repr()  # answers may be deep and long
_SHORT.maxstring = _SHORT.maxother = 120


def _field(value: Any, name: str, default: Any = _REQUIRED) -> Any:
    if not isinstance(value, dict):
        raise ServerError(f"{_describe(value)} stands where an object with {name!r} should be")
    if name not in value and default is _REQUIRED:
        raise ServerError(f"the answer has no {name!r}: {_describe(value)}")
    return value.get(name, default)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ServerError(f"{name!r} is {_describe(value)}, which is no list")
    return value


def _ids(value: Any, name: str) -> list[int]:
    for token in _list(value, name):
        if not _is_whole(token) or token < 0:
            raise ServerError(f"{name!r} holds {_describe(token)}, which is no token id")
    return list(value)


def _id_of(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and text == str(int(text))):
        raise ServerError(f"{where}: {_describe(text)} is no token id")
    return int(text)


def _log_prob(value: Any, where: str) -> float:
    number = isinstance(value, float) or _is_whole(value)
    if not number or not math.isfinite(value) or value > MOST_ABOVE_ONE:
        raise ServerError(f"{where}: {_describe(value)} is no log-probability")
    return float(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64


def _describe(value: Any) -> str:
    return harmless(_SHORT.repr(value)[:200])
