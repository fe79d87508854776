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

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gkd.loss.signals import TeacherSignal, TopKSignal
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.vllm import VLLMRollout
from gkd.servers.answers import Entry, ServedModel, own_score, prompt_scores_of, top_scores
from gkd.servers.checks import START_SECONDS
from gkd.servers.client import RefusedError, ServerError, VLLMClient
from gkd.teachers.base import Teacher

_TOKENS_ONLY = "/inference/v1/generate"  # about half the cost: no text is made of the K tokens; not always open
_COMPLETIONS = "/v1/completions"
_ENOUGH = 8  # targets that are not all alike by chance
_BYTES_PER_SCORE = 400  # of JSON, text of a token and its rank included; about 70 in fact

T = TypeVar("T")
Entries = list[Entry]  # vLLM's prompt_logprobs, one for each token
# One row's targets: ids and log-probabilities, K each, and the log-probability of the target itself.
Scores = tuple[list[list[int]], list[list[float]], list[float]]


class ServerTeacher(Teacher):
    """Scores on one or several vLLM servers, one request per row, all rows at a time.

    Args:
        client: the servers.
        served: the base model they serve, which is the teacher.
        top_k: K; the server's --max-logprobs must allow it.
        vocabulary: ids from here on are an error, since the student has no such token; None allows all (a teacher
            with another tokenizer).

    Raises:
        ValueError: the server does not score, or not that many tokens.
    """

    remote = True
    writes = True
    top_k: int

    def __init__(self, client: VLLMClient, served: ServedModel, top_k: int, vocabulary: int | None = None) -> None:
        self.client, self.served, self.top_k, self.vocabulary = client, served, top_k, vocabulary
        self._path = self._find_path()

    def repo(self, kwargs: Any = None) -> tuple[str | None, str | None]:
        """As the server names it."""
        return self.served.root, None

    def identity(self) -> str | None:
        return self.served.root

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
        ids_of = [row for ids, _, _ in scores for row in ids]
        log_probs_of = [row for _, log_probs, _ in scores for row in log_probs]
        own = [value for _, _, of_targets in scores for value in of_targets]
        if self.top_k > 1 and len(log_probs_of) >= _ENOUGH and all(row[0] == row[-1] for row in log_probs_of):
            raise ServerError(
                f"{self.client.field}: all {self.top_k} scores of a position are equal, at every position"
            )
        return TopKSignal(
            torch.tensor(ids_of, dtype=torch.long, device=device).view(-1, self.top_k),
            torch.tensor(log_probs_of, dtype=torch.float32, device=device).view(-1, self.top_k),
            torch.tensor(own, dtype=torch.float32, device=device),
        )

    def rollout(self, settings: SamplingSettings, *, seed: int, source: str) -> VLLMRollout:
        """From the server's own model."""
        return VLLMRollout(self.client, self.served, settings, seed=seed, source=source, vocabulary=self.vocabulary)

    def log_probs(self, sequences: Sequence[tuple[list[int], int]]) -> list[list[float]]:
        """As `Teacher.log_probs`.

        Raises:
            ValueError, ServerError: as `score`.
        """

        def own(ids: list[int], start: int) -> Callable[[Entries], list[float]]:
            return lambda scores: [own_score(scores[t], t, ids[t]) for t in range(start, len(ids))]

        calls = [self._call(ids, row, own(ids, start)) for row, (ids, start) in enumerate(sequences)]
        return self.client.run_all(calls)

    # ------------------------------------------------------------------------------------------------ a request

    def _scores_of(self, ids: list[int], positions: list[int], row: int) -> Callable[[threading.Event], Scores]:
        return self._call(ids, row, lambda scores: self._read(scores, positions, ids))

    def _call(self, ids: list[int], row: int, read: Callable[[Entries], T]) -> Callable[[threading.Event], T]:
        room = self.served.max_model_len
        if room is not None and len(ids) >= room:
            raise ValueError(
                f"{self.client.field}: a sequence of {len(ids)} tokens and the one that a request must generate do "
                f"not fit into max_model_len={room}: start the server with a larger --max-model-len, or lower "
                "max_length or max_new_tokens"
            )

        def call(stop: threading.Event) -> T:
            most = 1_000_000 + _BYTES_PER_SCORE * len(ids) * (self.top_k + 2)
            body = self.client.post(self._path, self._payload(self._path, ids), first=row, stop=stop, most=most)
            try:
                return read(prompt_scores_of(body, self.served.name, ids))
            except ServerError as error:
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

    def _read(self, scores: Entries, positions: list[int], ids: list[int]) -> Scores:
        tops = [top_scores(scores[t], t, self.top_k, self.vocabulary) for t in positions]
        own = [own_score(scores[t], t, ids[t]) for t in positions]
        return [most for most, _ in tops], [log_probs for _, log_probs in tops], own

    def _find_path(self) -> str:
        """Score two tokens: shows which way in is open, and whether the server allows K."""
        refusals = []
        for path in (_TOKENS_ONLY, _COMPLETIONS):
            try:
                timeout = min(self.client.timeout, START_SECONDS)
                for url in self.client.urls:
                    body = self.client.post(path, self._payload(path, [0, 0]), url=url, timeout=timeout)
                    self._read(prompt_scores_of(body, self.served.name, [0, 0]), [1], [0, 0])
                return path
            except RefusedError as error:
                refusals.append(str(error))
            except ServerError as error:
                raise ValueError(f"{self.client.field}: the teacher's server does not score: {error}") from error
        raise ValueError(
            f"{self.client.field}: the server refuses to score {self.top_k} tokens a position ({'; '.join(refusals)})."
            f" Start it with --max-logprobs {self.top_k} (vLLM's default is 20), or lower teacher_top_k"
        )
