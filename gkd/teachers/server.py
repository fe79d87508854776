"""A teacher on a vLLM server: it scores token ids and answers with its K most likely tokens at every position.

What arrives is exact: log-probabilities normalised over the whole vocabulary at temperature 1 (`prompt_logprobs`). So
the mass outside the K tokens is exact too and becomes the (K+1)-th outcome. What the server cannot say is how that
mass is spread, hence:

- the loss temperature is 1: another one needs the normaliser of the whole re-tempered distribution;
- the divergence over K + 1 outcomes is a lower bound of the one over V (merging outcomes never adds divergence), tight
  for the forward KL as soon as the teacher's top K hold nearly all of its mass. The reverse KL weighs tokens by the
  student: it does not see where, outside the teacher's top K, the student puts its mass, only how much.

Shapes: B rows, T tokens, N targets, K top-k.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gkd.signals import TeacherSignal, TopKSignal
from gkd.vllm_checks import START_SECONDS, ServedModel
from gkd.vllm_client import RefusedError, ServerError, VLLMClient

_TOKENS_ONLY = "/inference/v1/generate"  # about half the cost: no text is made of the K tokens; not always open
_COMPLETIONS = "/v1/completions"
_MOST_ABOVE_ONE = 1e-3  # by how much rounding may lift the sum of K probabilities above 1

T = TypeVar("T")
Entries = list[dict[str, Any] | None]  # vLLM's prompt_logprobs: a dictionary for each token but the first
Scores = tuple[list[list[int]], list[list[float]]]  # one row's targets: ids and log-probabilities, K each


class ServerTeacher:
    """Scores on one or several vLLM servers, one request per row, all rows at a time.

    Args:
        client: the servers.
        served: the base model they serve, which is the teacher.
        top_k: K; the server's --max-logprobs must allow it.

    Raises:
        ValueError: the server does not score, or not that many tokens.
    """

    model: Any = None

    def __init__(self, client: VLLMClient, served: ServedModel, top_k: int) -> None:
        self.client, self.served, self.top_k = client, served, top_k
        self._path = self._find_path()

    def head_parameters(self) -> Iterable[Tensor | None]:
        return ()

    @torch.no_grad()
    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        """`input_ids`, `attention_mask`, `labels` [B, T], padded on the right -> [N, K], in row-major order.

        Raises:
            ValueError: a sequence longer than the server takes.
            ServerError: the server stayed out of reach, or a token's score is missing, misplaced or not a number.
        """
        device = batch["input_ids"].device
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        calls = []
        for row, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
            positions = [t for t in range(1, len(labels)) if labels[t] != -100]  # the token at t, predicted at t - 1
            if positions:
                assert positions[-1] < lengths[row], "a target in the padding"
                calls.append(self._scores_of(ids[: positions[-1] + 1], positions, row))
        scores: list[Scores] = self.client.run_all(calls)
        ids_of = [row for ids, _ in scores for row in ids]
        log_probs_of = [row for _, log_probs in scores for row in log_probs]
        return TopKSignal(
            torch.tensor(ids_of, dtype=torch.long, device=device).view(-1, self.top_k),
            torch.tensor(log_probs_of, dtype=torch.float32, device=device).view(-1, self.top_k),
        )

    def log_probs(self, sequences: Sequence[tuple[list[int], int]]) -> list[list[float]]:
        """log p, in nats, of the tokens from `start` on of each (ids, start), given all before them.

        Raises:
            ValueError, ServerError: as `score`.
        """

        def own(ids: list[int], start: int) -> Callable[[Entries], list[float]]:
            return lambda scores: [_own_log_prob(scores, ids, t) for t in range(start, len(ids))]

        calls = [self._call(ids, row, own(ids, start)) for row, (ids, start) in enumerate(sequences)]
        return self.client.run_all(calls)

    # ------------------------------------------------------------------------------------------------ a request

    def _scores_of(self, ids: list[int], positions: list[int], row: int) -> Callable[[threading.Event], Scores]:
        return self._call(ids, row, lambda scores: self._read(scores, ids, positions))

    def _call(self, ids: list[int], row: int, read: Callable[[Entries], T]) -> Callable[[threading.Event], T]:
        room = self.served.max_model_len
        if room is not None and len(ids) >= room:
            raise ValueError(
                f"{self.client.field}: a sequence of {len(ids)} tokens and the one that a request must generate do "
                f"not fit into max_model_len={room}: start the server with a larger --max-model-len, or lower "
                "max_length or max_new_tokens"
            )

        def call(stop: threading.Event) -> T:
            body = self.client.post(self._path, self._payload(self._path, ids), first=row, stop=stop)
            try:
                return read(_prompt_logprobs(body))
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise ServerError(
                    f"{self.client.field}: the scores of row {row} ({len(ids)} tokens) cannot be used: {error}"
                ) from error

        return call

    def _payload(self, path: str, ids: list[int]) -> dict[str, Any]:
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self.top_k}
        if path == _TOKENS_ONLY:
            sampling["detokenize"] = False
            return {"model": self.served.name, "token_ids": ids, "sampling_params": sampling}
        return {"model": self.served.name, "prompt": ids, **sampling}

    def _read(self, scores: Entries, ids: list[int], positions: list[int]) -> Scores:
        """The K most likely tokens of each target. An entry holds K tokens, and the sequence's own when it is not
        among them: so that token shows that entry and position belong together.

        Raises:
            ValueError: a position or token is missing, or a log-probability is not one.
        """
        top_ids, top_log_probs = [], []
        for t in positions:
            entry = _entry(scores, ids, t)
            ranked = sorted(((value["logprob"], int(token)) for token, value in entry.items()), reverse=True)
            ranked = ranked[: self.top_k]
            if len(ranked) < self.top_k:
                raise ValueError(f"position {t} has {len(ranked)} scores, not teacher_top_k={self.top_k}")
            mass = math.fsum(math.exp(value) for value, _ in ranked)  # NaN fails the comparison
            if not mass <= 1 + _MOST_ABOVE_ONE or not math.isfinite(ranked[-1][0]):
                raise ValueError(f"position {t}: {mass} is not the mass of {self.top_k} probabilities")
            top_ids.append([token for _, token in ranked])
            top_log_probs.append([value for value, _ in ranked])
        return top_ids, top_log_probs

    def _find_path(self) -> str:
        """Score two tokens: shows which way in is open, and whether the server allows K."""
        refusals = []
        for path in (_TOKENS_ONLY, _COMPLETIONS):
            try:
                timeout = min(self.client.timeout, START_SECONDS)
                for url in self.client.urls:
                    body = self.client.post(path, self._payload(path, [0, 0]), url=url, timeout=timeout)
                    self._read(_prompt_logprobs(body), [0, 0], [1])
                return path
            except RefusedError as error:
                refusals.append(str(error))
            except (ServerError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.client.field}: the teacher's server does not score: {error}") from error
        raise ValueError(
            f"{self.client.field}: the server refuses to score {self.top_k} tokens a position ({'; '.join(refusals)})."
            f" Start it with --max-logprobs {self.top_k} (vLLM's default is 20), or lower teacher_top_k"
        )


def _entry(scores: Entries, ids: list[int], t: int) -> dict[str, Any]:
    """What the server says of the token at position t.

    Raises:
        ValueError: it has other positions, or says nothing of this token.
    """
    if len(scores) != len(ids):
        raise ValueError(f"{len(scores)} positions for {len(ids)} tokens")
    entry = scores[t] or {}
    if str(ids[t]) not in entry:
        raise ValueError(f"token {ids[t]} at position {t} is missing from its scores")
    return entry


def _own_log_prob(scores: Entries, ids: list[int], t: int) -> float:
    value = float(_entry(scores, ids, t)[str(ids[t])]["logprob"])
    if not value <= _MOST_ABOVE_ONE:  # NaN fails the comparison
        raise ValueError(f"position {t}: {value} is no log-probability")
    return value


def _prompt_logprobs(body: dict[str, Any]) -> Entries:
    scores = body.get("prompt_logprobs")
    if scores is None:
        scores = body["choices"][0].get("prompt_logprobs")
    if not isinstance(scores, list):
        raise ValueError("the answer holds no prompt_logprobs")
    return scores
