"""Rollouts on a vLLM server: token ids go there, token ids come back, over HTTP.

Text is never made into tokens again, and nothing is left to the server's own defaults: every request holds all
sampling parameters, the stop token ids, and a seed of its own, so that a completion depends on (seed, step, row,
source) and not on the rank that asks for it. A server in reduced precision computes a row a little differently next to
other rows, as in-process rollouts of different batches do; only greedy or fp32 results repeat to the token.

Where several rules restrict the next token, vLLM applies min_p before top_k and top_p, transformers after them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gkd.models.generation_mode import generation_mode
from gkd.rollouts.adapter_upload import AdapterUpload, agree, has_adapter, version_of
from gkd.rollouts.base import Rollout, RolloutOrder, SamplingSettings, row_seed
from gkd.rollouts.sleep import SharedDevice
from gkd.rollouts.weight_upload import WeightUpload
from gkd.servers.answers import Completion, ServedModel, completions_of, is_unfinished
from gkd.servers.client import RefusedError, ServerError, VLLMClient

# Mean difference, in nats, of the log-probability of the most likely next token between server and trainer, above
# which they do not hold the same weights. bf16 against fp32 gives about 0.05.
WEIGHTS_TOLERANCE = 0.3
_COMPARED_PROMPTS = 8
_TOO_LONG = "lower max_new_tokens or max_prompt_length, or start it with a larger --max-model-len"
_BYTES_PER_TOKEN = 400  # of JSON: an id, its text in an error or log-probability, rounded up generously


@dataclass(frozen=True)
class _Request:
    """Rollouts that have been asked for.

    Attributes:
        step, prompts, rows: of the call. version: the optimizer step whose weights sample, that is, how many steps
            they have been trained for. model: their stamp.
        failure: what was wrong before anything was asked for. future: the completions of each
            request. stop: set to give up.
    """

    step: int
    prompts: list[list[int]]
    rows: list[int]
    version: int
    model: str
    failure: Exception | None
    future: Future[list[list[Completion]]]
    stop: threading.Event


class VLLMRollout(Rollout):
    """Samples from a server: the student through its adapter or all its weights, or a server's own model (a teacher).

    Args:
        client: the servers.
        served: the base model they serve.
        settings: how to sample; of `extra`, only `min_new_tokens` and `suppress_tokens` exist on a server.
        seed: the run's seed, part of the key of the random numbers.
        source: `"student"` or `"teacher"`, so that the two draw different numbers for the same row.
        get_model: gives the student as the trainer holds it; None samples from the base model.
        adapter_dir: where the student's adapter or weights are written for the server, see `AdapterUpload`.
        accelerator: to agree with the other ranks; None is one process.
        vocabulary: ids from here on are an error, since the other model could not read them; None allows all.
        log_probs: ask for the log-probabilities of the sampled tokens, to compare weights by.
        num_completions: so many rows with consecutive numbers have the same prompt: one request for all of them, from
            whose seed vLLM makes one for each.
        shares_device: the servers' engines are on the GPUs of the training, and sleep between two rollouts.

    Raises:
        ValueError: an option that a server cannot honour; an adapter that is not plain LoRA.
    """

    def __init__(
        self,
        client: VLLMClient,
        served: ServedModel,
        settings: SamplingSettings,
        *,
        seed: int,
        source: str = "student",
        get_model: Callable[[], nn.Module] | None = None,
        adapter_dir: str = "rollout_adapters",
        accelerator: Accelerator | None = None,
        vocabulary: int | None = None,
        log_probs: bool = False,
        num_completions: int = 1,
        shares_device: bool = False,
    ) -> None:
        foreign = sorted(set(settings.extra) - {"min_new_tokens", "suppress_tokens"})
        if foreign:
            raise ValueError(
                f"generation_kwargs {foreign} are transformers' own and do nothing on a vLLM server: leave them out, "
                "or roll out in process (rollout_backend='hf')"
            )
        super().__init__(settings)
        self.client, self.served, self.server_field = client, served, client.field
        self.seed, self.source, self.accelerator = seed, source, accelerator
        self.get_model, self.vocabulary = get_model, vocabulary
        self.upload: AdapterUpload | WeightUpload | None = None
        if get_model is not None and has_adapter(get_model()):
            self.upload = AdapterUpload(client, get_model, accelerator, adapter_dir)
        elif get_model is not None:
            self.upload = WeightUpload(client, served.name, get_model, accelerator, adapter_dir)
        self.device = SharedDevice(client, accelerator) if shares_device else None
        self._weights_compared = get_model is None
        self._ahead: _Request | None = None
        self._asks_log_probs, self._number = log_probs, num_completions

    @classmethod
    def of(cls, order: RolloutOrder) -> VLLMRollout:
        """The student is loaded on the server at once: a refusal comes before the training."""
        made = cls(
            order.server.client,
            order.server.served,
            order.settings,
            seed=order.seed,
            source=order.source,
            get_model=order.get_model if order.source == "student" else None,
            adapter_dir=order.adapter_dir,
            accelerator=order.accelerator,
            vocabulary=order.vocabulary,
            log_probs=order.log_probs,
            num_completions=order.num_completions,
            shares_device=order.shares_device,
        )
        if made.upload is not None:
            made.upload.current(step=0)
        if made.device is not None:
            made.device.rest()
        return made

    def generate(
        self, prompts: list[list[int]], step: int, rows: list[int] | None = None, teachers: list[int] | None = None
    ) -> list[list[int]]:
        """Sample one completion for each prompt, see `Rollout.generate`. Every rank must call this for every step.

        Raises:
            ValueError: an empty prompt, or one that leaves no room for `max_new_tokens`; a server that holds other
                weights than the student, or refuses its adapter. All ranks raise it.
            ServerError: a server stayed out of reach or answered what cannot be used. All ranks raise it.
        """
        rows = self._numbered(prompts, rows)
        request, self._ahead = self._ahead, None
        if request is None:
            request = self._ask(prompts, step, rows, version=step)
        asked_for = (request.step, request.rows, request.prompts)
        assert asked_for == (step, rows, prompts), f"step {request.step} was asked for ahead, not {step}"
        completions = self._answers(request)
        if self.upload is not None and self.upload.lost(request.model):  # a server was started anew in between
            request = self._ask(prompts, step, rows, version=step)
            completions = self._answers(request)
        if self.device is not None:
            self.device.rest()
        self._weights_compared = True
        self.age = step - request.version
        self.log_probs = [answer.log_probs for answer in completions if answer.log_probs is not None]
        return [answer.ids for answer in completions]

    def _answers(self, request: _Request) -> list[Completion]:
        """The completions that were asked for; what failed on any rank is raised on all."""
        completions: list[Completion] = []
        failure = request.failure
        try:
            completions = [one for answer in request.future.result() for one in answer]
        except (ServerError, ValueError) as error:
            failure = failure or error
        agree(self.accelerator, request.model, failure)
        return completions

    def generate_ahead(self, prompts: list[list[int]], step: int, rows: list[int]) -> None:
        """Ask for the completions of the next step, from the weights that this step starts with, and come back at
        once: `generate` for that step then waits for them, and raises what went wrong. Every rank must call this.

        Raises:
            ValueError, ServerError: the adapter cannot be loaded. All ranks raise it.
        """
        assert self._ahead is None, "one step ahead, not two"
        self._ahead = self._ask(prompts, step, rows, version=step - 1)

    def forget(self) -> None:
        """Give up what was asked for ahead; a request that the server is answering ends with its answer."""
        if self._ahead is not None:
            self._ahead.stop.set()
            self._ahead = None

    def _ask(self, prompts: list[list[int]], step: int, rows: list[int], version: int) -> _Request:
        """Upload the present weights and send the requests; what fails for this rank alone is kept for later."""
        if self.device is not None:
            self.device.wake()
        model = stamp = self.served.name if self.upload is None else self.upload.current(version)
        if self.upload is not None:
            assert version_of(stamp) == version, (stamp, version)
            model = self.upload.asked_as(stamp)
        failure: Exception | None = None
        calls: list[Callable[[threading.Event], list[Completion]]] = []
        try:
            if not self._weights_compared:
                self._compare_weights(model, [prompt for prompt in prompts if prompt][:_COMPARED_PROMPTS])
            room = self.served.max_model_len
            limit = f"the server's max_model_len={room}"
            self._check_prompts(prompts, step, rows, room, limit=limit, remedy=_TOO_LONG)
            asked = self.settings  # of this step: they may be others before all is answered
            firsts = range(0, len(prompts), self._number)
            assert all(prompts[i : i + self._number] == [prompts[i]] * self._number for i in firsts)
            calls = [self._call(model, prompts[i], step, rows[i], asked) for i in firsts]
        except (ServerError, ValueError) as error:
            failure = error
        stop = threading.Event()
        pool = ThreadPoolExecutor(1, thread_name_prefix="gkd-rollout")
        future = pool.submit(self.client.run_all, calls, stop)
        pool.shutdown(wait=False)
        return _Request(step, prompts, rows, version, stamp, failure, future, stop)

    # ------------------------------------------------------------------------------------------------ a request

    def _call(
        self, model: str, prompt: list[int], step: int, row: int, settings: SamplingSettings
    ) -> Callable[[threading.Event], list[Completion]]:
        def call(stop: threading.Event) -> list[Completion]:
            payload = {**self._payload(model, prompt, step, row, settings), "n": self._number}
            if self._asks_log_probs:
                payload["logprobs"] = 0  # of the sampled tokens, and of no others
            answers = self._post(payload, row, stop, self._asks_log_probs)
            return [self._checked(one, row + place, settings) for place, one in enumerate(answers)]

        return call

    def _payload(
        self, model: str, prompt: list[int], step: int, row: int, settings: SamplingSettings
    ) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": prompt,
            "n": 1,
            "max_tokens": settings.max_new_tokens,
            "min_tokens": int(settings.extra.get("min_new_tokens") or 0),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "min_p": settings.min_p or 0.0,
            "repetition_penalty": settings.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {str(token): -100.0 for token in settings.extra.get("suppress_tokens") or ()},
            "stop_token_ids": list(settings.stop_ids),
            "ignore_eos": True,  # the stop ids above are complete; the server's own would come on top
            "seed": row_seed(self.seed, step, row, self.source),
            "return_token_ids": True,
            "stream": False,
        }

    def _post(
        self, payload: dict[str, Any], row: int, stop: threading.Event | None = None, log_probs: bool = False
    ) -> list[Completion]:
        """The completions, which must come from the model that was asked for.

        Raises:
            ServerError: it does not, or is no such answer.
        """
        tokens = payload["n"] * (len(payload["prompt"]) + payload["max_tokens"])
        path, most = "/v1/completions", 1_000_000 + _BYTES_PER_TOKEN * tokens
        options: dict[str, Any] = {"again": is_unfinished, "stop": stop, "most": most}
        try:
            body = self.client.post(path, payload, first=row, **options)
        except RefusedError as error:
            if error.status != 404 or not isinstance(self.upload, AdapterUpload):
                raise
            self.upload.restore(error.url, payload["model"])
            body = self.client.post(path, payload, url=error.url, **options)
        try:
            return completions_of(body, payload["model"], payload["prompt"], log_probs=log_probs, number=payload["n"])
        except ServerError as error:
            raise ServerError(f"{self.client.field}: for row {row} the server gives {error}") from error

    def _checked(self, completion: Completion, row: int, settings: SamplingSettings) -> Completion:
        """The completion, after a look at what must hold for its ids.

        Raises:
            ServerError: it does not.
        """
        ids = completion.ids
        wrong = None
        if not 1 <= len(ids) <= settings.max_new_tokens:
            wrong = f"{len(ids)} tokens, where max_new_tokens={settings.max_new_tokens}"
        elif self.vocabulary is not None and max(ids) >= self.vocabulary:
            wrong = f"token {max(ids)}, where the vocabulary has {self.vocabulary}"
        elif set(ids[:-1]) & set(settings.stop_ids):
            wrong = "tokens behind a stop token"
        elif len(ids) < settings.max_new_tokens and ids[-1] not in settings.stop_ids:
            wrong = f"an end without a stop token (finish_reason={completion.finish_reason!r})"
        if wrong:
            raise ServerError(f"{self.client.field}: for row {row} the server gives {wrong}")
        return completion

    # ------------------------------------------------------------------------------------------------- checks

    def _compare_weights(self, model: str, prompts: list[list[int]]) -> None:
        """Once, before the first rollout: the server's next-token log-probabilities against the trainer's."""
        gaps = []
        assert self.get_model is not None
        with generation_mode(self.get_model(), self.accelerator) as student:  # a collective under ZeRO-3
            for row, prompt in enumerate(prompts):
                ids = torch.tensor([prompt], device=student.device)
                ours = student(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
                payload = self._payload(model, prompt, 0, row, self.settings)
                payload |= {"max_tokens": 1, "temperature": 0.0, "logprobs": 0, "repetition_penalty": 1.0}
                payload |= {"min_tokens": 0, "logit_bias": {}}
                (answer,) = self._post(payload, row, log_probs=True)
                if len(answer.ids) != 1 or answer.ids[0] >= len(ours):
                    raise ServerError(f"{self.client.field}: asked for one token, the server gives {answer.ids[:8]}")
                assert answer.log_probs is not None
                gaps.append(abs(float(ours[answer.ids[0]]) - answer.log_probs[0]))
        if gaps and not sum(gaps) / len(gaps) < WEIGHTS_TOLERANCE:
            raise ValueError(
                f"{self.client.field}: the server does not hold the student's weights: log-probabilities of the next "
                f"token differ by {sum(gaps) / len(gaps):.2f} nats on average. It serves {self.served.root!r}: serve "
                "the base model that the student was loaded from"
            )
