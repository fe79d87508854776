"""The divergences, and the fused pass that takes them. Needs torch and nothing else.

aligned: the divergence of two models that cut the same text into different tokens
borders: tokens at which two models of different tokenizers stand at one place of the text: the pass
    over them
by_source: another divergence for each source of sequences: the targets of a micro-batch split up by
    who wrote them
chunks: one call of the fused divergence at work: projections, chunks, blocks, and the gradients
    they add up to
compiled: the work of `gkd.loss.eager` as one pure function for `torch.compile`: for accelerators,
    where traffic is the cost
cross_entropy: the student's own side without a teacher, chunk by chunk: cross-entropy with its
    gradient, and what a target costs
dense: the generalized JSD on dense logits, for those who have them: the drop-in replacement of
    TRL's static method
divergences: each divergence: its equation, its paper, `phi` and `phi_a` (see `gkd.loss.integrand`),
    and a quick form of both
eager: the arithmetic of a few tokens' logits: softmax in place, statistics, the divergence and its
    gradient
fused: output heads, softmax, divergence and gradient in one pass over chunks of target tokens
integrand: what a divergence of two next-token distributions is: an integrand and its derivative
outcomes: the outcomes over which two models of different tokenizers are compared at one place:
    common tokens and the rest
overlap: whether student and teacher think of the same tokens: the overlap of their most likely
    ones, on a few targets
parts: several teachers, or losses, in one micro-batch: the fused pass runs once for each, over its
    own targets
projection: hidden states times an output head, and back: which dtype the factors have, and which
    the products
registry: divergences by name: which there are, and one made with those of the parameters that it
    has
settings: what goes into the fused divergence besides tensors, and what comes out of it
signals: what the teacher says about the N target tokens, and the output head that turns hidden
    states into logits
token_weights: weights of single tokens: rules from the literature, from what the fused pass says about
    each token
"""

from gkd.loss.fused import fused_divergence
from gkd.loss.integrand import Divergence
from gkd.loss.registry import DIVERGENCES, make_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import AlignedSignal, DenseSignal, Head, TopKSignal

__all__ = [
    "DIVERGENCES",
    "AlignedSignal",
    "DenseSignal",
    "Divergence",
    "Head",
    "LossSettings",
    "TopKSignal",
    "fused_divergence",
    "make_divergence",
]
