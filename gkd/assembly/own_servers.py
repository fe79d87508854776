"""The vLLM servers that a run starts, for rollouts or for its teacher: what they serve, and on which GPUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from peft import PeftModel
from torch import nn

from gkd.config.fields import GKDConfig
from gkd.config.servers import longest_sequences, with_served_teacher
from gkd.models.facts import model_name
from gkd.models.loading import load_config
from gkd.rollouts.adapter_upload import agree
from gkd.servers.client import ServerError
from gkd.servers.engine import EngineOrder, devices_of_servers
from gkd.servers.own import Address, free_port, known, remember, server_for

TOP_K = 32  # log-probabilities of a server whose recipe names no teacher_top_k
OWN_MEMORY, SHARED_MEMORY = 0.9, 0.4  # of a GPU


def own_rollout_servers(args: GKDConfig, student: nn.Module, accelerator: Accelerator) -> str:
    """The addresses of this run's servers for rollouts, one on each node, ready. All ranks call this and get the same.

    Args:
        args: of the run, with `rollout_server="auto"`.
        student: on its device already.

    Raises:
        ValueError: a student that no server can load; no GPU or no memory for it; no vLLM; one that does not start.
        ServerError: it takes too long.
    """
    return _started(args, "rollout", accelerator, lambda: rollout_order(args, student, accelerator))


def with_own_teacher(args: GKDConfig, teacher: Any) -> GKDConfig:
    """The fields of a run whose teacher is on a server; with `teacher_server="auto"` it is started for that, one on
    each node. All ranks call this.

    Args:
        args: of the run. teacher: its name, where `teacher_model_name_or_path` does not tell it.

    Raises:
        ValueError: a teacher that was made in memory; otherwise as for `own_rollout_servers`.
        ServerError: as there.
    """
    if args.teacher_server is None:
        return args
    name = args.teacher_model_name_or_path if teacher is None else teacher
    if not isinstance(name, str):
        raise ValueError(
            "teacher_server='auto' needs the teacher's name or folder, from which the server loads it: set "
            "teacher_model_name_or_path"
        )
    state = PartialState()
    devices = () if state.device.type != "cuda" else gpus_of(args, "teacher")
    return with_served_teacher(args, _started(args, "teacher", state, lambda: teacher_order(args, name, devices)))


def _started(args: GKDConfig, who: str, state: Accelerator | PartialState, order: Callable[[], EngineOrder]) -> str:
    address, failure = None, None
    if state.is_local_main_process:
        try:
            asked = order()
            if state.num_processes > _local_ranks():
                asked = replace(asked, host="0.0.0.0")
            address = server_for(asked, Path(args.own_server_folder) / f"{who}-{state.process_index}.log").address
        except (ServerError, ValueError, OSError) as error:
            failure = error
    agree(state, "", failure)
    found = [address] if state.num_processes == 1 else gather_object([address])
    return remember([one for one in found if one is not None])


def _local_ranks() -> int:
    """Processes of the run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))


def gpus_of(args: GKDConfig, who: str | None) -> tuple[str, ...]:
    """The GPUs of this node's server of "rollout" or "teacher", as CUDA_VISIBLE_DEVICES names them; all for None.

    Raises:
        ValueError: none is left beside the ranks that train.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    if who is None:
        return tuple(visible)
    # Once it runs, its address stands in the fields, as that of any server.
    teacher_runs = known((args.teacher_server_url or "").split(",")[0]) is not None
    return devices_of_servers(
        visible,
        _local_ranks(),
        rollouts=args.rollout_server is not None,
        shared=args.rollout_server_sharing is not None,
        teacher=args.teacher_server is not None or teacher_runs,
    )[who]


def gone_of(addresses: list[Address]) -> Callable[[], str | None]:
    """Tells why one of the servers will never answer again, where that can be seen from this machine."""
    return lambda: next((reason for one in addresses if (reason := one.gone()) is not None), None)


def rollout_order(args: GKDConfig, student: nn.Module, accelerator: Accelerator) -> EngineOrder:
    """What this node's server is started with.

    Raises:
        ValueError: see `own_rollout_servers`.
    """
    bare: Any = extract_model_from_parallel(student, keep_torch_compile=False)
    adapter = max(config.r for config in bare.peft_config.values()) if isinstance(bare, PeftModel) else None
    shared = args.rollout_server_sharing is not None
    devices: tuple[str, ...] = ()
    if accelerator.device.type == "cuda":
        devices = gpus_of(args, "rollout")
    elif shared:
        raise ValueError("rollout_server_sharing='sleep' is for GPUs: a vLLM server on a CPU does not sleep")
    if shared:
        torch.cuda.empty_cache()
        check_room(*torch.cuda.mem_get_info(accelerator.device), memory_share(args))
    if not devices and adapter is None and getattr(bare.config, "tie_word_embeddings", False):
        raise ValueError(
            "rollout_server='auto' cannot serve this student on a CPU: its head is tied to its embeddings, and vLLM's "
            "CPU engine keeps a copy of the head that new weights do not reach. Train with LoRA (use_peft), or roll "
            "out in process (rollout_backend='hf')"
        )
    saved = next((p.dtype for p in bare.parameters() if p.is_floating_point()), None)
    return order_of(args, model_name(bare), adapter, devices, saved)


def order_of(
    args: GKDConfig,
    model: str | None,
    lora_rank: int | None,
    devices: tuple[str, ...],
    saved: torch.dtype | None = None,
) -> EngineOrder:
    """The same from the fields; `saved` is the dtype of the student's weights.

    Raises:
        ValueError: a student without a name, or an adapter that is too large.
    """
    if model is None:
        raise ValueError(
            "rollout_server='auto' needs the student's name or folder, from which the server loads it, and this one "
            "was made in memory: save it and pass the folder"
        )
    return _order(
        args,
        model,
        args.model_init_kwargs,
        dtype=_dtype(args, saved),
        max_model_len=longest_sequences(args)["student"],
        lora_rank=lora_rank,
        whole_weights=lora_rank is None,
        sleeps=args.rollout_server_sharing is not None,
        memory=memory_share(args) if devices else None,
        devices=devices,
    )


def teacher_order(args: GKDConfig, model: str, devices: tuple[str, ...]) -> EngineOrder:
    """What a server for the teacher's scores, and for what it writes, is started with."""
    kwargs = args.teacher_model_init_kwargs
    asked = kwargs.get("dtype", "auto") if isinstance(kwargs, dict) else "auto"
    if str(asked) == "auto":
        asked = _dtype(args, None)
    if str(asked) == "auto":
        asked = load_config(model, trust_remote_code=bool(args.trust_remote_code)).dtype or torch.float32
    return _order(
        args,
        model,
        kwargs,
        dtype=str(asked).removeprefix("torch."),
        max_model_len=longest_sequences(args)["teacher"],
        top_log_probs=args.teacher_top_k or TOP_K,
        memory=OWN_MEMORY if devices else None,
        devices=devices,
    )


def _order(args: GKDConfig, model: str, init_kwargs: Any, **own: Any) -> EngineOrder:
    """What both kinds are started with, beside each one's own; what cannot be is refused now."""
    kwargs = init_kwargs if isinstance(init_kwargs, dict) else {}
    order = EngineOrder(
        model,
        args.vllm_python or sys.executable,
        free_port(),
        revision=kwargs.get("revision"),
        extra=args.vllm_args or "",
        trust_remote_code=bool(args.trust_remote_code),
        **own,
    )
    order.flags()
    return order


def memory_share(args: GKDConfig) -> float:
    """Of a GPU, for the rollouts' server."""
    default = OWN_MEMORY if args.rollout_server_sharing is None else SHARED_MEMORY
    return args.rollout_server_memory or default


def _dtype(args: GKDConfig, saved: torch.dtype | None) -> str:
    """What a model computes in within the trainer; otherwise the server would be another one. vLLM's own "auto" makes
    16 bits of a model that was saved in 32."""
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    return "auto" if saved is None else str(saved).removeprefix("torch.")


def check_room(free: int, total: int, share: float) -> None:
    """Whether the server finds its memory beside the models that are on the GPU already; all in bytes.

    Raises:
        ValueError: it does not.
    """
    if free < share * total:
        raise ValueError(
            f"rollout_server_memory={share:g} is {share * total / 1e9:.1f} GB of this GPU, and {free / 1e9:.1f} GB "
            "are free beside the models: lower it, offload the teacher (teacher_placement='cpu_offload'), or give the "
            "server GPUs of its own (fewer --num_processes, no rollout_server_sharing)"
        )
