"""Launches and options of a launch that this trainer cannot work under, refused before anything is loaded."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers.integrations import get_available_reporting_integrations

from gkd.common.launcher import end_with_the_launcher
from gkd.config.fields import GKDConfig
from gkd.models.zero import zero_stage

# Who starts tasks -> the variables that give their number, in the order in which accelerate asks.
_TASKS = {"mpirun": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), "srun": ("SLURM_STEP_NUM_TASKS",)}
_SIZES = ("tp_size", "cp_size", "sp_size", "dp_shard_size")


def check_launch(args: GKDConfig) -> None:
    """Refuse launchers, and options of the launch, that this trainer cannot work under.

    Raises:
        ValueError: FSDP; a model or a sequence split over ranks; tasks that do not know of each other; several GPUs
            without a launcher; `ddp_static_graph`; `dispatch_batches`.
    """
    end_with_the_launcher()
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "FSDP is not supported: the output heads and the rollouts need whole weights; use DDP "
            "(deepspeed_configs/ddp.yaml) or, for models that do not fit, ZeRO-3 (deepspeed_configs/zero3.yaml)"
        )
    _check_loggers(args)
    _check_parallelism(args)
    check_tasks(args.world_size)
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which can train on one: start a process for each "
            f"(accelerate launch --num_processes {args.n_gpu} ...), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.ddp_static_graph:
        raise ValueError(
            "ddp_static_graph=True is not supported: the loss is taken inside the model, where DDP's static graph "
            "does not look for it, and gradients would not be averaged over the ranks: leave it out"
        )
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config={'dispatch_batches': True} is not supported: the main process would join rows of "
            "different lengths for the others. Leave it out: each process reads its own rows"
        )


def _check_loggers(args: GKDConfig) -> None:
    """Trackers whose packages are not there; those that transformers does not look for are left to their callbacks."""
    missing = set(args.report_to) - {*get_available_reporting_integrations(), "azure_ml", "flyte"}
    if missing:
        name = min(missing)
        raise ValueError(
            f"report_to={name!r}: its package is not installed here, or switched off: install it, or take {name} out "
            "of report_to (none for no tracker)"
        )


def _check_parallelism(args: GKDConfig) -> None:
    asked = [f"{name}={size}" for name, size in _split_sizes(args).items() if size > 1]
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        names = {name: f"PARALLELISM_CONFIG_{name.upper()}" for name in _SIZES}
        asked += [f"{name}={os.environ[name]}" for name in names.values() if int(os.environ.get(name, 1)) > 1]
    loading: Any = args.model_init_kwargs or {}
    asked += [
        f"{name}={loading[name]!r}" for name in ("tp_plan", "tp_size", "distributed_config") if loading.get(name)
    ]
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: models or sequences that are split over ranks (tensor, context and sequence "
            "parallelism) are not supported, since a target's next token and the whole output head must be on its "
            "own rank: use DDP, or ZeRO-3 for models that do not fit"
        )


def _split_sizes(args: GKDConfig) -> dict[str, int]:
    config = args.parallelism_config
    sizes = {name: int(getattr(config, name, 1) or 1) for name in _SIZES}
    deepspeed: Any = getattr(getattr(args, "hf_deepspeed_config", None), "config", None) or {}
    sizes["tensor_parallel.autotp_size"] = int(deepspeed.get("tensor_parallel", {}).get("autotp_size") or 1)
    sizes["sequence_parallel_size"] = int(deepspeed.get("sequence_parallel_size") or 1)
    return sizes


def check_tasks(joined: int) -> None:
    """Refuse tasks of a launcher that would each train alone, into the same folder.

    Args:
        joined: processes that know of each other.

    Raises:
        ValueError: the launcher started another number.
    """
    if "WORLD_SIZE" in os.environ:
        started = os.environ["WORLD_SIZE"]
        if int(started) != joined:
            raise ValueError(
                f"the launcher started WORLD_SIZE={started} processes, but accelerate joined {joined}: "
                "each would train alone. On CPUs pass --use_cpu; otherwise see that every process sees its accelerator"
            )
        return
    told = [(who, name) for who, names in _TASKS.items() for name in names if int(os.environ.get(name) or 1) > 1]
    found = [f"{name}={os.environ[name]}" for _, name in told if int(os.environ[name]) != joined]
    who = told[0][0] if told else "srun"
    if not told and int(os.environ.get("SLURM_PROCID") or 0) > 0 and joined == 1:  # a task that is not the first
        found = [f"SLURM_PROCID={os.environ['SLURM_PROCID']}"]
    if found:
        raise ValueError(
            f"{who} started several tasks ({', '.join(found)}) that do not know of each other: each would train "
            "alone, into the same output_dir. Start one task on each machine, in it accelerate launch or torchrun; "
            "if each task is a run of its own, with an output_dir of its own, set WORLD_SIZE=1"
        )


def check_wiring(accelerator: Accelerator) -> None:
    """Refuse launches that came out as something else than was asked for, which would train all the same.

    Raises:
        ValueError: processes that do not know of each other, DeepSpeed left out, ZeRO-3 that cannot save a model.
    """
    check_tasks(accelerator.num_processes)
    wanted = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if wanted and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError(
            f"the launcher asks for DeepSpeed, but accelerate runs {accelerator.distributed_type.value}: take "
            f"ACCELERATE_USE_CPU={os.environ.get('ACCELERATE_USE_CPU')} out of the environment, pass --use_cpu instead"
        )
    if zero_stage(accelerator) == 3:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "ZeRO-3 without stage3_gather_16bit_weights_on_model_save saves no weights: set it to true in the "
                "DeepSpeed config (zero3_save_16bit_model: true in an accelerate config file)"
            )
