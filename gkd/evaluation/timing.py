"""What a decoding step costs: seconds of a pass over a few tokens behind a prompt in the KV cache."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

REPEATS, WARM = 9, 2


def step_seconds(model: Any, prompt: Sequence[int], tokens: int) -> float:
    """The median of a few passes; `model` is ready to generate."""
    device = model.device
    ids = torch.tensor([list(prompt)], device=device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    step, seconds = ids[:, -1:].expand(1, tokens).contiguous(), []
    for _ in range(WARM + REPEATS):
        own = copy.deepcopy(cache)
        _finished(device)
        begun = time.perf_counter()
        model(input_ids=step, past_key_values=own, use_cache=True)
        _finished(device)
        seconds.append(time.perf_counter() - begun)
    return median(seconds[WARM:])


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
