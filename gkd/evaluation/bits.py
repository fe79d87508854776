"""Bits per byte: what texts cost a model, whatever tokens it reads them in.

A perplexity is per token, so that of a model with longer tokens is larger for the same text. -log2 p of a text over
its bytes is the same question to all (as in The Pile, arXiv 2101.00027). Counted are the tokens that stand for text:
neither the end of a turn nor what a vocabulary has no token for (`<unk>`), which have no bytes. A text is taken as
its tokenizer writes it; it could be written in other tokens, too, so that the number is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gkd.data.sequences import TokenSequence
from gkd.data.targets import IGNORE
from gkd.data.token_bytes import token_bytes
from gkd.evaluation.measures import Estimate, ratio_estimate

Nats = Sequence[Sequence[float]]  # of the targets of each sequence


@dataclass(frozen=True)
class Sizes:
    """How many bytes of text each id of a tokenizer stands for, 0 for none; or why that is not known."""

    of_ids: list[int] | None
    unknown: str = ""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Sizes:
        try:
            return cls([len(piece or b"") for piece in token_bytes(tokenizer)])
        except ValueError:  # which names fields that have nothing to do with it
            return cls(None, f"{type(tokenizer).__name__} does not say which bytes its tokens stand for")

    def bits(self, key: str, sequences: Sequence[TokenSequence], nll: Nats) -> dict[str, Estimate]:
        """`bits_per_byte` by the name of its metric; nothing where no sizes are known."""
        return {} if self.of_ids is None else {key: bits_per_byte(sequences, nll, self.of_ids)}


def bits_per_byte(sequences: Sequence[TokenSequence], nll: Nats, sizes: Sequence[int]) -> Estimate:
    """Over all targets of the sequences that stand for text.

    Args:
        sequences: in the model's own tokens. nll: -log p of the targets of each, in nats.
        sizes: bytes of each id.
    """
    bits, lengths = [], []
    for sequence, values in zip(sequences, nll, strict=True):
        ids = [label for label in sequence.labels[1:] if label != IGNORE]
        of_each = [sizes[i] if i < len(sizes) else 0 for i in ids]
        of_text = [value for value, size in zip(values, of_each, strict=True) if size]
        bits.append(math.fsum(of_text) / math.log(2))
        lengths.append(float(sum(of_each)))
    return ratio_estimate(bits, lengths)
