"""The run's mixed precision, for models that nothing else brings into it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from gkd.models.zero import zero_stage

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def mixed_precision(accelerator: Accelerator | None, model: nn.Module) -> AbstractContextManager[object]:
    """Autocast as the training has it; for a forward pass outside the training step.

    accelerate's own does nothing under DeepSpeed, whose engine converts the weights instead. A model that is not in an
    engine (the student before the first step, a teacher) is in fp32 there if it was loaded so, and would compute in
    another precision than the training, or not at all: FlashAttention takes no fp32.

    Args:
        accelerator: None is no mixed precision.
        model: the model that runs, bare or prepared.
    """
    if accelerator is None:
        return nullcontext()
    if zero_stage(accelerator) == 0:
        return accelerator.autocast()
    dtype, prepared = _DTYPES.get(accelerator.mixed_precision), hasattr(model, "zero_optimization_stage")
    if dtype is None or prepared or next(model.parameters()).dtype != torch.float32:
        return nullcontext()
    return torch.autocast(accelerator.device.type, dtype)
