"""What depends on how the ranks are wired: gathering ZeRO-3 parameters, preparing a frozen model, summing over ranks.

Formulas never ask `if distributed`; they call these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn


def zero_stage(accelerator: Accelerator) -> int:
    """The DeepSpeed ZeRO stage in use, 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return 0 if plugin is None else int(plugin.zero_stage)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor | None]) -> Iterator[None]:
    """Make ZeRO-3 parameters whole inside, read-only; nothing for ordinary ones. A collective: all ranks enter."""
    sharded = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode and no gradients, for good."""
    model.eval()
    model.requires_grad_(False)
    return model


def place_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Put a frozen model where it can be scored with: sharded under ZeRO-3, whole on this rank's device otherwise.

    Under DDP and ZeRO-1/2 a frozen model needs no engine of its own: it has no gradients to reduce and no optimizer.
    """
    freeze(model)
    if zero_stage(accelerator) == 3:
        from trl.models.utils import prepare_deepspeed

        return freeze(prepare_deepspeed(model, accelerator))
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model = model.to(accelerator.device)
    return model


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise sum over ranks, on the accelerator's device. A collective."""
    return accelerator.reduce(values.to(accelerator.device), reduction="sum")


def max_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise maximum over ranks, on the accelerator's device. A collective."""
    gathered_values = accelerator.gather(values.to(accelerator.device)[None])
    return torch.amax(gathered_values, dim=0)
