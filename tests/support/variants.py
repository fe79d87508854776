"""Every divergence with parameters that make another formula of it, and logits to take it of."""

import torch

from gkd.loss import DIVERGENCES

ALL = [(name, {}) for name in DIVERGENCES] + [
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 1.0}),
    ("skew_forward_kl", {"skew_lambda": 0.6}),
    ("symmetric_kl", {"symmetric_kl_weight": 0.2}),
    ("alpha_beta", {"ab_alpha": 0.2, "ab_beta": 0.7}),
]


VARIANTS = [
    ("jsd", {}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("jsd", {"beta": 1.0}),
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("skew_forward_kl", {}),
    ("skew_forward_kl", {"skew_lambda": 0.6}),
    ("skew_reverse_kl", {}),
    ("skew_reverse_kl", {"skew_lambda": 0.6}),
    ("total_variation", {}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"akl_mu": 0.8}),
    ("symmetric_kl", {}),
    ("symmetric_kl", {"symmetric_kl_weight": 0.0}),
    ("symmetric_kl", {"symmetric_kl_weight": 0.3}),
    ("symmetric_kl", {"symmetric_kl_weight": 1.0}),
    ("alpha_beta", {}),
    ("alpha_beta", {"ab_alpha": 0.2, "ab_beta": 0.7}),
    ("alpha_beta", {"ab_alpha": 1.0, "ab_beta": 1.5}),
]


IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in parameters.items())}" for name, parameters in VARIANTS]


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)


def softmax_gradient(slope, p):
    return slope - p * slope.sum(-1, keepdim=True)
