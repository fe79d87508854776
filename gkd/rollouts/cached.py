"""Each prompt is answered once: completions of a model that does not change, kept on disk.

This is Kim & Rush's sequence-level distillation as it was meant (arXiv 1606.07947, section 3.2): the teacher writes a
fixed data set. A prompt has one completion, whichever step, epoch, rank or run meets it, so its random numbers go by
the prompt (and the seed), not by step and row as those of other rollouts do.

A completion is made anew when anything that it depends on changes: the prompt's ids, the model's weights or config,
how it is sampled, its stop tokens, the seed. What the key leaves out changes rounding at most: the batch it is
sampled in, the device, the versions of the libraries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gkd.distributed import gathered, sum_over_ranks
from gkd.rollouts.base import Rollout, SamplingSettings
from gkd.sequence_store import SequenceStore, digest, prompt_number

_SAMPLES = 256  # words of a parameter that are hashed with their place


class SampledRollout(Rollout, Protocol):
    """A rollout that says how it samples."""

    @property
    def settings(self) -> SamplingSettings: ...


class CachedRollout:
    """Answers from the store, and asks `inner` for what is not there yet.

    Args:
        inner: a rollout of a frozen model.
        store: made for `key_of` this model and these settings.
        accelerator: to agree with the other ranks; None is one process.
    """

    def __init__(self, inner: SampledRollout, store: SequenceStore, accelerator: Accelerator | None = None) -> None:
        self.inner = inner
        self.store = store
        self.accelerator = accelerator

    @property
    def settings(self) -> SamplingSettings:
        return self.inner.settings

    def generate(self, prompts: list[list[int]], step: int, rows: list[int] | None = None) -> list[list[int]]:
        """One completion for each prompt, always the same; `step` and `rows` do not matter. All ranks call this."""
        if any(prompt not in self.store for prompt in prompts):
            self.store.refresh()  # another rank or run may have met them
        missing = list({tuple(prompt): prompt for prompt in prompts if prompt not in self.store}.values())
        if self._over_ranks(len(missing)):
            # A sharded model generates only with all ranks, so also a rank that lacks nothing calls.
            completions = self.inner.generate(missing, 0, [prompt_number(prompt) for prompt in missing])
            self.store.add(zip(missing, completions, strict=True))
        return [self.store.get(prompt) for prompt in prompts]

    def _over_ranks(self, number: int) -> int:
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return number
        return int(sum_over_ranks(self.accelerator, torch.tensor(number)))


def key_of(settings: SamplingSettings, seed: int, model_fingerprint: str) -> dict[str, Any]:
    """All that a completion depends on beside its prompt.

    Raises:
        ValueError: an option without a value that can be compared (a logits processor, say).
    """
    for name, value in settings.extra.items():
        try:
            digest(value)
        except TypeError as error:
            raise ValueError(
                f"generation_kwargs[{name!r}] cannot be compared between runs ({error}), so completions cannot be "
                "kept: leave it out, or set teacher_cache_dir='off'"
            ) from error
    sampling = asdict(replace(settings, extra={}, stop_ids=tuple(sorted(set(settings.stop_ids)))))
    del sampling["pad_id"]  # never read
    sampling["extra"] = {name: repr(value) for name, value in settings.extra.items()}
    return {"model": model_fingerprint, "sampling": sampling, "seed": seed}


def fingerprint(model: nn.Module, *, frozen_only: bool = False) -> str:
    """32 hexadecimal digits of a model's config and weights; the name and the folder it came from do not matter.

    `frozen_only`: of the weights that are not trained, and nothing else.

    Of every parameter: name, shape, dtype, the sum of all its bytes as 64-bit words (so one changed weight shows), and
    256 words spread over it (so an exchange shows). Read at memory speed. Of an adapter also how strongly it acts.
    Sharded parameters (ZeRO-3) are gathered one at a time: all ranks call this, and all get the result that an
    unsharded model gives.

    Raises:
        ValueError: weights that are not in memory (offloaded to disk).
    """
    state = hashlib.blake2b(digest_size=16)
    state.update(digest(None if frozen_only else _config(model)).encode())
    for place, module in () if frozen_only else model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict):
            state.update(json.dumps([place, module.scaling]).encode())
    for name, parameter in model.named_parameters():
        if frozen_only and parameter.requires_grad:
            continue
        with gathered([parameter]), torch.no_grad():
            if parameter.device.type == "meta":
                raise ValueError(
                    f"the teacher's {name} is offloaded, so a change of it would go unseen: set teacher_cache_dir="
                    "'off', or keep the teacher in memory"
                )
            about = [name, list(parameter.shape), str(parameter.dtype)]
            state.update(json.dumps([*about, *_content(parameter.detach())]).encode())
    return state.hexdigest()


def _content(values: Tensor) -> list[int]:
    """The sum of all 64-bit words (modulo 2^64: in any order), some of the words, and the odd bytes at the end."""
    flat = values.contiguous().view(-1).view(torch.uint8)
    if flat.device.type not in ("cpu", "cuda") or flat.storage_offset() % 8:
        flat = flat.cpu().clone()
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    sample = words[:: max(1, len(words) // _SAMPLES)]
    return [int(words.sum()), *sample.tolist(), *flat[whole:].tolist()]


def _config(model: nn.Module) -> Any:
    """The config without what says nothing about the completions: names, versions, how attention is computed."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return _comparable(to_dict()) if to_dict is not None else None


def _comparable(value: Any) -> Any:
    if isinstance(value, Mapping):
        left_out = ("transformers_version", "architectures", "use_cache", "dtype", "torch_dtype")
        return {str(k): _comparable(v) for k, v in value.items() if str(k) not in left_out and str(k)[:1] != "_"}
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
