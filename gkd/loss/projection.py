"""Hidden states times an output head, and back: which dtype the factors have, and which the products.

Shapes: N target tokens, V vocabulary, D hidden size, C tokens of a chunk.
"""

from __future__ import annotations

from copy import copy
from functools import lru_cache

import torch
from torch import Tensor

from gkd.loss.signals import Head

# Elements of a head that are converted to fp32 at once, where the device cannot leave fp32 products of bf16 factors.
_BLOCK_ELEMENTS = 2**20


@lru_cache
def has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies bf16 or fp16 factors into fp32: CUDA from torch 2.8 on; ROCm learnt it later.

    Tried out rather than read from version numbers.
    """
    if device.type != "cuda":
        return False
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        product: Tensor = torch.mm(ones, ones, out_dtype=torch.float32)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return bool((product == 16).all() and (total == 17).all())


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class Projection:
    """One model's hidden states and head, in the dtype of the matrix products."""

    def __init__(self, hidden: Tensor, head: Head, vocab: int, dtype: torch.dtype) -> None:
        if hidden.shape[1] != head.weight.shape[1]:
            raise ValueError(
                f"hidden states {list(hidden.shape)} do not fit the head's weight {list(head.weight.shape)}"
            )
        compute = _compute_dtype(hidden)
        self.hidden = hidden.detach().to(compute)
        self.weight = head.weight.detach()[:vocab].to(compute)
        self.bias = None if head.bias is None else head.bias.detach()[:vocab].to(compute)
        self.logit_scale, self.softcap, self.dtype = head.logit_scale, head.softcap, dtype
        # Logits are fp32 whatever the factors' dtype: rounded to bf16, they would put 3 % of noise into the gradient.
        # Only an accelerator without such products rounds them like the model's own: there fp32 factors cost too much.
        self.in_blocks = compute != dtype and hidden.device.type in ("cpu", "mps")
        self.wide = compute != dtype and has_wide_products(hidden.device, compute)

    def rows(self, index: Tensor) -> Projection:
        """The same head with some of the hidden states."""
        some = copy(self)
        some.hidden = self.hidden.index_select(0, index)
        return some

    def buffer(self, chunk: int) -> Tensor:
        dtype = self.dtype if self.wide or self.in_blocks else self.hidden.dtype
        return torch.empty(chunk, self.weight.shape[0], dtype=dtype, device=self.hidden.device)

    def project(self, at: slice, out: Tensor | None) -> Tensor:
        """h W^T + bias of the tokens `at`, written to the beginning of `out` [C, V]."""
        assert out is not None
        out = out[: at.stop - at.start]
        if self.wide or self.in_blocks:
            if self.wide:
                torch.mm(self.hidden[at], self.weight.t(), out_dtype=self.dtype, out=out)
            else:
                self._project_in_blocks(self.hidden[at].to(self.dtype), out)
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(self.hidden[at], self.weight.t(), out=out)
        return torch.addmm(self.bias, self.hidden[at], self.weight.t(), out=out)

    def _project_in_blocks(self, hidden: Tensor, out: Tensor) -> None:
        size = max(1, _BLOCK_ELEMENTS // self.weight.shape[1])
        for start in range(0, self.weight.shape[0], size):
            block = self.weight[start : start + size].to(self.dtype)
            torch.mm(hidden, block.t(), out=out[:, start : start + size])

    def logits(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scaled and soft-capped logits in fp32 (in place if raw is fp32), and the slope of the cap or None."""
        z = raw.to(self.dtype)
        if self.logit_scale != 1:
            z.mul_(self.logit_scale)
        if self.softcap is None:
            return z, None
        z.div_(self.softcap).tanh_()
        slope = 1 - z * z
        return z.mul_(self.softcap), slope

    def back(self, gradient: Tensor) -> Tensor:
        """Gradient [C, V] of the logits -> of the hidden states [C, D]."""
        if self.wide:
            return torch.mm(gradient, self.weight, out_dtype=self.dtype)
        return torch.mm(gradient, self.weight).to(self.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> None:
    """total += left @ (scale * right), accumulated in total's fp32 whatever the dtype of the factors."""
    if left.dtype == total.dtype:
        total.addmm_(left, right * scale)
    elif left.dtype == torch.bfloat16 and has_wide_products(total.device, left.dtype):
        # On tensor cores. Not for fp16, whose range a token's factor may leave.
        torch.addmm(total, left, (right * scale).to(left.dtype), out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype) * scale)
