"""Sums and maxima over ranks, the same on one process. Formulas never ask `if distributed`; they call these."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from gkd.common.devices import sum_dtype


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise sum over ranks, on the accelerator's device. A collective."""
    return accelerator.reduce(_on(accelerator.device, values), reduction="sum")


def _on(device: torch.device, values: Tensor) -> Tensor:
    """There, in float32 where float64 values meet a device without float64."""
    return values.to(device, sum_dtype(device) if values.dtype == torch.float64 else values.dtype)


def max_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise maximum over ranks, on the accelerator's device. A collective."""
    gathered_values = accelerator.gather(_on(accelerator.device, values)[None])
    return torch.amax(gathered_values, dim=0)
