"""What depends on how the ranks are wired: gathering ZeRO-3 parameters, preparing a frozen model, summing over ranks.

Formulas never ask `if distributed`; they call these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from gkd.metrics import sum_dtype
from gkd.quantized import keep_layout


def zero_stage(accelerator: Accelerator) -> int:
    """The DeepSpeed ZeRO stage in use, 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return 0 if plugin is None else int(plugin.zero_stage)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor | None]) -> Iterator[None]:
    """Make ZeRO-3 parameters whole inside, read-only; nothing for ordinary ones. A collective: all ranks enter.

    What is whole already stays so, on leaving too (a small parameter that ZeRO-3 never splits, an outer `gathered`).
    """
    sharded: list[Any] = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [p for p in sharded if p.ds_status != ZeroParamStatus.AVAILABLE]
    with deepspeed.zero.GatheredParameters(missing, enabled=bool(missing)):
        yield


@contextlib.contextmanager
def without_zero_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, modules of a ZeRO-3 engine run without DeepSpeed's hooks: none of them gathers, releases or records.

    For rollouts from parameters that are `gathered`: a rank may then run as many forward passes as it likes, also
    none. Every hook comes back as and where it was, so DeepSpeed's trace of the training step stays valid.

    Args:
        model: the model as the trainer holds it; nothing happens unless it is a ZeRO-3 engine.
    """
    optimizer = getattr(model, "optimizer", None)
    offload: Any = getattr(optimizer, "parameter_offload", optimizer)  # a frozen model's engine has the offload itself
    if not hasattr(offload, "fwd_pre_hook"):
        yield
        return
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    tables = {id(table): table for handle in handles if (table := handle.hooks_dict_ref()) is not None}
    before = [(table, dict(table)) for table in tables.values()]
    of_deepspeed = {handle.id for handle in handles}
    for table, hooks in before:
        for key in of_deepspeed.intersection(hooks):
            del table[key]
    parameter: Any
    for parameter in model.parameters():
        parameter.ds_active_sub_modules.clear()  # modules whose backward hook had no reason to run still count as busy
    try:
        yield
    finally:
        for table, hooks in before:
            table.clear()
            table.update(hooks)


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


def place_student(model: nn.Module, accelerator: Accelerator) -> None:
    """Put the student where it will be trained. Under ZeRO-1 and ZeRO-2 nobody else does so before training starts,
    and an evaluation before it would run on the CPU."""
    keep_layout(model)
    if zero_stage(accelerator) in (1, 2) and not getattr(model, "is_quantized", False):
        model.to(accelerator.device)


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
