"""Prompts of many lengths, and the in-process rollout that writes for them."""

from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.hf import HFRollout

PROMPTS = [[5], [9] * 11, [3, 4, 258, 6, 7], [60, 61], list(range(100, 117)), [1, 2, 3], [258, 258]]


def rollout_of(model, batch_size=None, seed=0, source="student", **settings):
    settings = {"max_new_tokens": 12} | settings
    return HFRollout(
        lambda: model, None, SamplingSettings(**settings), seed=seed, source=source, batch_size=batch_size
    )
