"""Rollouts in the training process, with the model that is being trained.

transformers prepares everything (cache, masks, positions, rules on the next token); the decoding loop is ours, for
three reasons: a row's tokens come from the row's own random numbers, so they do not depend on the rows next to it;
a finished row leaves the batch, so one long row costs one row's time; and no global random generator is touched.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import RepetitionPenaltyLogitsProcessor

from gkd.common.devices import sum_dtype
from gkd.models.facts import position_limit
from gkd.models.generation_mode import generation_mode
from gkd.rollouts.base import Rollout, RolloutOrder, SamplingSettings, row_uniforms
from gkd.rollouts.batch_size import check_batch_size
from gkd.rollouts.folding import castable, foldable, folded
from gkd.rollouts.kv_cache import can_drop_rows, keep_rows, places_to_keep, take_rows, use_growing_layers
from gkd.rollouts.sampling import NOT_A_TOKEN, most_likely, sample

# Rules that read the row's earlier tokens: left padding would be read as tokens, so such rows are not padded.
_READS_IDS = frozenset({"bad_words_ids", "logits_processor", "no_repeat_ngram_size", "sequence_bias"})


class HFRollout(Rollout):
    """Sample completions with the model itself.

    Args:
        get_model: gives the model as the trainer holds it (bare, DDP, DeepSpeed engine) at the time of the call.
        accelerator: for its autocast; None runs without.
        settings: how to sample.
        seed: the run's seed, part of the key of the random numbers.
        source: `"student"` or `"teacher"`, so that the two draw different numbers for the same row.
        batch_size: rows decoded at once, which bounds the memory of the KV cache; None takes all, a function is asked
            for them with the model's config and device.
        merge_adapter: fold a LoRA adapter into the weights for the rollout (see `adapter.py`): faster, at the price of
            a second copy of the adapted weights meanwhile.

    Raises:
        ValueError: `batch_size` below 1.
    """

    def __init__(
        self,
        get_model: Callable[[], nn.Module],
        accelerator: Accelerator | None,
        settings: SamplingSettings,
        *,
        seed: int,
        source: str = "student",
        batch_size: int | Callable[[Any, torch.device], int] | None = None,
        merge_adapter: bool = True,
    ) -> None:
        if not callable(batch_size):
            check_batch_size(batch_size)
        super().__init__(settings)
        self.get_model = get_model
        self.accelerator = accelerator
        self.seed = seed
        self.source = source
        self.batch_size = batch_size
        self.merge_adapter = merge_adapter

    @classmethod
    def of(cls, order: RolloutOrder) -> HFRollout:
        return cls(
            order.get_model,
            order.accelerator,
            order.settings,
            seed=order.seed,
            source=order.source,
            batch_size=order.batch_size,
            merge_adapter=order.fold_adapter,
        )

    def generate(
        self, prompts: list[list[int]], step: int, rows: list[int] | None = None, teachers: list[int] | None = None
    ) -> list[list[int]]:
        """Sample one completion for each prompt, see `Rollout.generate`.

        Under ZeRO-3 every rank must call this for every step, with no prompts if it has none.

        Raises:
            ValueError: an empty prompt, or a prompt that leaves no room for `max_new_tokens`; the row is named.
        """
        rows = self._numbered(prompts, rows)
        self._check_prompts(prompts, step, rows)
        completions: list[list[int]] = [[] for _ in prompts]
        with (
            generation_mode(self.get_model(), self.accelerator) as model,
            self._folded(model, prompts, step),
        ):
            room, binds = position_limit(model.config)
            self._check_prompts(prompts, step, rows, room if binds else None, limit=f"the model's {room} positions")
            size = self.batch_size(model.config, model.device) if callable(self.batch_size) else self.batch_size
            for chunk in self._chunks(prompts, size):
                sampled = self._generate_chunk(model, [prompts[i] for i in chunk], step, [rows[i] for i in chunk])
                for i, completion in zip(chunk, sampled, strict=True):
                    completions[i] = completion
                if self.tick is not None:
                    self.tick(len(chunk))
        return completions

    def _folded(self, model: PreTrainedModel, prompts: list[list[int]], step: int) -> AbstractContextManager[None]:
        layers = self._layers_to_fold(model, prompts)
        return folded(layers, self.seed, step, castable(model) if layers else [])

    def _layers_to_fold(self, model: PreTrainedModel, prompts: list[list[int]]) -> list[Any]:
        # On CPU (135M parameters, 16 rows, r=16) PEFT's merging took as long as the adapter costs in 3 to 4 steps.
        pays = self.settings.max_new_tokens >= 8 and bool(prompts)
        return foldable(model) if self.merge_adapter and pays else []

    def _chunks(self, prompts: list[list[int]], size: int | None) -> Iterator[list[int]]:
        """Indices of the prompts decoded together: longest first, so that memory runs out at once or never."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        unpadded = not _READS_IDS.isdisjoint(self.settings.extra)
        start = 0
        for end in range(1, len(order) + 1):
            full = end - start == size
            new_length = end < len(order) and len(prompts[order[end]]) != len(prompts[order[start]])
            if end == len(order) or full or (unpadded and new_length):
                yield order[start:end]
                start = end

    def _generate_chunk(self, model: Any, prompts: list[list[int]], step: int, rows: list[int]) -> list[list[int]]:
        settings, device = self.settings, model.device
        numbers = [row_uniforms(self.seed, step, row, self.source, settings.max_new_tokens) for row in rows]
        # Equal prompts are read once.
        different = {tuple(prompt): place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        copies = [different[tuple(prompt)] for prompt in prompts]
        prompts = list(map(list, different))
        width = max(map(len, prompts))
        # Masked positions hold the row's own first token: nothing that counts the row's tokens sees a foreign one.
        input_ids = torch.tensor([prompt[:1] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        processors = LogitsProcessorList(settings.extra.get("logits_processor", ()))
        if settings.repetition_penalty != 1:
            # transformers' own setting is bound to the rows it starts with, and rows leave.
            processors.insert(0, RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        # Without float64 the cumulative sums are a little coarser.
        uniforms = torch.tensor(numbers, dtype=sum_dtype(device), device=device)
        decoding = _Decoding(settings, uniforms, copies if len(copies) > len(prompts) else None)
        model.generate(
            inputs=input_ids,
            attention_mask=mask,
            generation_config=_generation_config(settings),
            logits_processor=processors,
            custom_generate=decoding.run,
            synced_gpus=False,
        )
        return decoding.completions


def _generation_config(settings: SamplingSettings) -> GenerationConfig:
    options = {key: value for key, value in settings.extra.items() if key != "logits_processor"}
    if not settings.greedy:
        options |= {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": settings.min_p,
        }
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=not settings.greedy,
        eos_token_id=list(settings.stop_ids) or None,
        pad_token_id=settings.pad_id,
        use_cache=True,
        **options,
    )


class _Decoding:
    """The decoding loop of one chunk, in the form `generate(custom_generate=...)` calls.

    Args:
        uniforms: [B, max_new_tokens].
        copies: which of the prompts each of the B rows goes on from; None: they are as many.
    """

    def __init__(self, settings: SamplingSettings, uniforms: Tensor, copies: list[int] | None = None) -> None:
        self.settings, self.copies = settings, copies
        self.uniforms = uniforms
        self.completions: list[list[int]] = [[] for _ in range(len(uniforms))]

    def run(
        self,
        model: Any,  # a PreTrainedModel; nn.Module hides its methods from the type checker
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """Decode until every row has a stop token or the cap; the tokens are in `completions`."""
        rows = list(range(len(self.completions)))  # rows[i]: the row at place i of the batch
        finished: set[int] = set()
        uniforms = self.uniforms
        copies = None if self.copies is None else torch.tensor(self.copies, device=input_ids.device)
        cache = model_kwargs.get("past_key_values")
        use_growing_layers(cache)
        if copies is not None and not can_drop_rows(cache):  # nor can a row of it be copied
            input_ids, copies = _copied(model_kwargs, input_ids, copies), None
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        for position in range(self.settings.max_new_tokens):
            if position > 0:
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
                outputs = model(**inputs, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
            logits = outputs.logits[:, -1]
            if copies is not None:
                input_ids, logits, copies = _copied(model_kwargs, input_ids, copies), logits[copies], None
            scores = logits_processor(input_ids, logits.float())
            del outputs, logits  # they hold the logits, and after the prefill perhaps those of every position
            tokens = most_likely(scores) if self.settings.greedy else sample(scores, uniforms[:, position])
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            self._record(rows, finished, tokens.tolist())
            leaving = {place for place, row in enumerate(rows) if row in finished}
            if len(leaving) == len(rows):
                break
            if leaving and can_drop_rows(model_kwargs.get("past_key_values")):
                places = places_to_keep(len(rows), leaving)
                index = torch.tensor(places, device=input_ids.device)
                input_ids, uniforms = input_ids[index], uniforms[index]
                _keep_rows(model_kwargs, places, index, len(rows))
                rows = [rows[place] for place in places]
        return input_ids

    def _record(self, rows: list[int], finished: set[int], tokens: list[int]) -> None:
        """Append each running row's token; a stop token finishes its row."""
        for row, token in zip(rows, tokens, strict=True):
            if token == NOT_A_TOKEN:
                raise FloatingPointError(
                    "a rollout met logits that are NaN, infinite or all excluded: the weights have diverged, or "
                    "generation_kwargs leave no token to choose from"
                )
            if row not in finished:
                self.completions[row].append(token)
                if token in self.settings.stop_ids:
                    finished.add(row)


def _copied(model_kwargs: dict[str, Any], input_ids: Tensor, index: Tensor) -> Tensor:
    """Rows of prompts become the rows that go on from them: in everything that `generate` carries, in place, and in
    the ids, which are returned."""
    _select(model_kwargs, index, len(input_ids), lambda cache: take_rows(cache, index))
    return input_ids[index]


def _keep_rows(model_kwargs: dict[str, Any], places: list[int], index: Tensor, size: int) -> None:
    """Keep the rows at `places`, of `size`, in everything that `generate` carries from step to step, in place."""
    _select(model_kwargs, index, size, lambda cache: keep_rows(cache, places, index.device))


def _select(model_kwargs: dict[str, Any], index: Tensor, size: int, of_cache: Callable[[Cache], None]) -> None:
    """The rows at `index`, of `size`, of each tensor with rows; a cache knows its own way."""
    for key, value in model_kwargs.items():
        if isinstance(value, Cache):
            of_cache(value)
        elif key == "position_ids" and isinstance(value, Tensor) and value.shape[-2] == size:
            model_kwargs[key] = value.index_select(-2, index)  # [B, T], or [axes, B, T] in models for images
        elif isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size:
            model_kwargs[key] = value[index]
