"""Each prompt is answered once: completions of a model that does not change, kept on disk.

This is Kim & Rush's sequence-level distillation as it was meant (arXiv 1606.07947, section 3.2): the teacher writes a
fixed data set. A prompt has one completion, whichever step, epoch, rank or run meets it, so its random numbers go by
the prompt (and the seed), not by step and row as those of other rollouts do.

A completion is made anew when anything that it depends on changes: the prompt's ids, the model's weights or config,
how it is sampled, its stop tokens, the seed. What the key leaves out changes rounding at most: the batch it is
sampled in, the device, the versions of the libraries.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator

from gkd.common.keyed_folder import digest
from gkd.common.ranks import sum_over_ranks
from gkd.rollouts.base import Rollout, SamplingSettings
from gkd.rollouts.store import SequenceStore, prompt_number


class KeptRollout(Rollout):
    """Answers from the store, and asks `inner` for what is not there yet.

    Args:
        inner: a rollout of a frozen model.
        store: made for `key_of` this model and these settings.
        accelerator: to agree with the other ranks; None is one process.
    """

    store: SequenceStore

    def __init__(self, inner: Rollout, store: SequenceStore, accelerator: Accelerator | None = None) -> None:
        super().__init__(inner.settings)
        self.inner = inner
        self.store = store
        self.accelerator = accelerator

    def generate(
        self, prompts: list[list[int]], step: int, rows: list[int] | None = None, teachers: list[int] | None = None
    ) -> list[list[int]]:
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
