"""DeepSpeed ZeRO-3 as a model shows it: is it split up, its weights gathered for a while, its hooks taken off."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn


def is_split(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has split it up over the ranks."""
    return hasattr(tensor, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split the model up: it then runs inside its engine only."""
    return any(map(is_split, model.parameters()))


def zero_stage(accelerator: Accelerator) -> int:
    """The DeepSpeed ZeRO stage in use, 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return 0 if plugin is None else int(plugin.zero_stage)


def join_ranks_on_cpu() -> None:
    """Join DeepSpeed's process group where there is no accelerator, before a model is split up (ZeRO-3). On GPUs
    accelerate does that, on CPUs only when DeepSpeed comes from a launch file of its own."""
    if torch.accelerator.is_available() or "RANK" not in os.environ:
        return
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor | None]) -> Iterator[None]:
    """Make ZeRO-3 parameters whole inside, read-only; nothing for ordinary ones. A collective: all ranks enter.

    What is whole already stays so, on leaving too (a small parameter that ZeRO-3 never splits, an outer `gathered`).
    """
    sharded: list[Any] = [p for p in parameters if p is not None and is_split(p)]
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
