"""Pick a token for each row from its logits: by the row's own random number, or the most likely one.

B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# What a step gives for a row without a finite logit: seen on the host, where the tokens arrive anyway.
NOT_A_TOKEN = -1


def sample(scores: Tensor, uniforms: Tensor, block: int = 1024) -> Tensor:
    """One token per row by inverse CDF: the first token whose cumulative probability exceeds the row's number.

    The sum goes over blocks of the vocabulary, then inside one block, in float64: one pass over the probabilities, and
    no long sum of small numbers in fp32. A token of probability 0 is never taken.

    Args:
        scores: logits [B, V], -inf where a rule excludes a token.
        uniforms: [B], from U[0, 1).

    Returns:
        Token ids [B].
    """
    probabilities = torch.softmax(scores.float(), dim=-1)
    rows, vocab = probabilities.shape
    blocks = nn.functional.pad(probabilities, (0, -vocab % block)).view(rows, -1, block)
    masses = blocks.sum(-1).to(uniforms.dtype)  # [B, ceil(V / block)]
    total = masses.sum(-1)
    which, rest = _first_above(masses, uniforms * total)
    inside = blocks[torch.arange(rows, device=scores.device), which].to(uniforms.dtype)
    token, _ = _first_above(inside, rest)
    return torch.where(total.isfinite(), which * block + token, NOT_A_TOKEN)


def _first_above(masses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the first place where the running sum of `masses` exceeds `target`, and what of `target` is left there.

    Where rounding leaves the whole sum at or below the target it is the last place with a positive mass.
    """
    cumulative = masses.cumsum(-1)
    places = torch.arange(masses.shape[-1], device=masses.device)
    last = torch.where(masses > 0, places, 0).amax(-1)
    index = torch.minimum((cumulative <= target[:, None]).sum(-1), last)
    before = nn.functional.pad(cumulative, (1, 0)).gather(-1, index[:, None]).squeeze(-1)
    return index, target - before


def most_likely(scores: Tensor) -> Tensor:
    """The most likely token of each row: [B, V] -> [B]."""
    best, tokens = scores.max(-1)
    return torch.where(best.isfinite(), tokens, NOT_A_TOKEN)
