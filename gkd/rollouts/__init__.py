"""Rollout backends: sample completions for prompts from a model. One class with `generate`, one line here."""

from __future__ import annotations

from gkd.rollouts.base import Rollout, SamplingSettings, is_truncated, repeated_ngram_share
from gkd.rollouts.hf import HFRollout
from gkd.rollouts.vllm import VLLMRollout

ROLLOUTS: dict[str, type] = {"hf": HFRollout, "vllm": VLLMRollout}

__all__ = [
    "ROLLOUTS",
    "HFRollout",
    "Rollout",
    "SamplingSettings",
    "VLLMRollout",
    "is_truncated",
    "repeated_ngram_share",
]
