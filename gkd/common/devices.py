"""The dtype in which a device takes sums: float64 where there is one."""

from __future__ import annotations

import torch

NO_FLOAT64 = {"mps"}


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """The widest dtype for sums on a device: float64, or float32 where there is none (Apple's GPUs, some of Intel's).

    In float32 counts are exact up to 2^24 tokens a period, and sums to about 1e-6.
    """
    device = torch.device(device)
    if device.type in NO_FLOAT64:
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64
