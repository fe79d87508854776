"""What decoding steps cost: passes over a few tokens behind a prompt in the KV cache, of several models in turn."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

WARM, LEAST, MOST, SECONDS = 2, 9, 60, 3.0  # passes of each that are not counted; that are; in about so much time

Step = Callable[[int], float]  # a number of tokens -> seconds of one pass over them


def step_of(model: Any, prompt: Sequence[int]) -> Step:
    """Passes of a model that is ready to generate."""
    device = model.device
    ids = torch.tensor([list(prompt)], device=device)
    cache = model(input_ids=ids, use_cache=True).past_key_values

    def step(tokens: int) -> float:
        own, read = copy.deepcopy(cache), ids[:, -1:].expand(1, tokens).contiguous()
        _finished(device)
        begun = time.perf_counter()
        model(input_ids=read, past_key_values=own, use_cache=True)
        _finished(device)
        return time.perf_counter() - begun

    return step


def best_of(passes: Sequence[Callable[[], float]]) -> list[float]:
    """The shortest time of each. They take turns, so that what else the machine does meets all of them, and the
    shortest is the one that it met least."""
    for one in passes:
        for _ in range(WARM):
            one()
    found: list[list[float]] = []
    begun = time.perf_counter()
    while len(found) < LEAST or (len(found) < MOST and time.perf_counter() - begun < SECONDS):
        found.append([one() for one in passes])
    return [min(column) for column in zip(*found, strict=True)]


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
