"""What a training belongs to: its settings, rows, models and how its ranks are wired, as plain facts.

A checkpoint keeps them, so that going on with something else is warned of; ranks compare them before the first step,
since two that differ would train on mixed gradients or wait for each other for ever.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from torch import nn

from gkd.models.facts import model_name
from gkd.models.fingerprint import fingerprint
from gkd.models.zero import zero_stage
from gkd.teachers.base import Teacher

# Settings that change neither weights nor what is trained on. All others, also those that are yet to come, are facts.
_WITHOUT_EFFECT = """
output_dir logging_dir run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
resume_from_checkpoint report_to overwrite_output_dir push_to_hub hub_model_id hub_strategy hub_token
hub_private_repo hub_always_push hub_revision logging_first_step log_level log_level_replica log_on_each_node
disable_tqdm logging_nan_inf_filter log_completions log_completions_steps num_completions_to_print
include_num_input_tokens_seen save_strategy save_total_limit save_only_model save_on_each_node save_steps
enable_jit_checkpoint restore_callback_states_from_checkpoint logging_strategy logging_steps eval_strategy
eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps eval_do_concat_batches
eval_use_gather_object batch_eval_metrics prediction_loss_only include_for_metrics load_best_model_at_end
metric_for_best_model greater_is_better do_train do_eval do_predict dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataset_num_proc
skip_memory_metrics torch_empty_cache_steps use_cpu local_rank ddp_timeout ddp_backend deepspeed debug
full_determinism use_cache teacher_cache_dir teacher_scores_dir rollout_server_url teacher_server_url
rollout_adapter_dir rollout_server_timeout loss_chunk_size rollout_batch_size max_nonfinite_steps server_proxy
rollout_logprob_tolerance teacher_chat_url rollout_server rollout_server_sharing rollout_server_memory
vllm_python vllm_args teacher_server
"""
_NO_FACTS = frozenset(_WITHOUT_EFFECT.split())
# Those of them that all ranks must agree on all the same: they say when ranks meet.
_MEETINGS = """
logging_strategy logging_steps logging_first_step eval_strategy eval_steps eval_delay eval_on_start
per_device_eval_batch_size save_strategy save_steps load_best_model_at_end max_nonfinite_steps
rollout_logprob_tolerance
"""
_LORA = """
peft_type r lora_alpha lora_dropout target_modules exclude_modules modules_to_save bias use_rslora use_dora
rank_pattern alpha_pattern layers_to_transform layers_pattern init_lora_weights target_parameters
"""
# What a checkpoint's state means nothing without.
ESSENTIAL = ("trained parameters", "student's frozen weights", "optimizer", "engine")


def facts_of(trainer: Any) -> dict[str, Any]:
    """The facts of a trainer, ready for JSON; secrets are hidden. Equal runs have equal facts."""
    args, accelerator = trainer.args, trainer.accelerator
    student = accelerator.unwrap_model(trainer.model)
    facts: dict[str, Any] = {name: value for name, value in args.to_dict().items() if _is_fact(name)}
    if args.teachers is not None:  # where servers are is no matter
        facts["teachers"] = {
            name: {key: "somewhere" if key == "server" else value for key, value in (entry or {}).items()}
            for name, entry in args.teachers.items()
        }
    facts["rows"] = rows_of(trainer.train_dataset)
    facts["student"] = model_name(student)
    facts |= {f"LoRA's {name}": value for name, value in _lora(student).items()}
    facts["trained parameters"] = _shapes(student)
    frozen = isinstance(student, PeftModel)
    facts["student's frozen weights"] = weights_of(student, frozen_only=True) if frozen else None
    for name, model in _teachers(trainer):
        facts[name] = model
    facts["engine"] = engine_of(accelerator)
    facts["precision"] = accelerator.mixed_precision
    facts["ranks"] = accelerator.num_processes
    facts["optimizer"] = trainer.optimizer_settings.kind
    return plain(facts)


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back; what JSON does not know as text, sets in order."""

    def other(value: Any) -> Any:
        return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)

    return dict(json.loads(json.dumps(facts, default=other)))


def _is_fact(name: str) -> bool:
    return name not in _NO_FACTS and not name.startswith("_") and name != "optim"


def rows_of(dataset: Any) -> str | None:
    """Their number and a checksum of what is trained on; the number alone for rows that are no `datasets.Dataset`."""
    if not hasattr(dataset, "__len__"):
        return None
    if not isinstance(dataset, Dataset):
        return f"{len(dataset)} rows"
    columns = sorted(dataset.column_names)
    value = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        for name in columns:
            column = table[name].combine_chunks()
            while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                value = zlib.crc32(_bytes(column.value_lengths().fill_null(-1)), value)
                column = column.flatten()
            value = zlib.crc32(_bytes(column), value)
    return f"{len(dataset):,} rows, checksum {value:08x}"


def _bytes(column: pa.Array) -> bytes:
    if pa.types.is_integer(column.type) and column.null_count == 0:
        return bytes(column.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return repr(column.to_pylist()).encode()


def weights_of(model: nn.Module, *, frozen_only: bool = False) -> str | None:
    """The fingerprint of a model's weights; None where some are not in memory. A collective under ZeRO-3."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    return fingerprint(model, frozen_only=frozen_only)[:12]


def engine_of(accelerator: Accelerator) -> str:
    """What keeps the optimizer's state."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return "torch"
    return f"DeepSpeed ZeRO-{zero_stage(accelerator)} on {accelerator.num_processes} ranks"


def _shapes(student: nn.Module) -> str:
    named = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    shapes = [(name, tuple(getattr(parameter, "ds_shape", parameter.shape))) for name, parameter in named]
    number = sum(int(np.prod(shape)) for _, shape in shapes)
    return f"{number:,} in {len(shapes):,} tensors, checksum {zlib.crc32(repr(shapes).encode()):08x}"


def _lora(student: Any) -> dict[str, Any]:
    if not isinstance(student, PeftModel):
        return {}
    config = student.active_peft_config
    return {name: getattr(config, name) for name in _LORA.split() if hasattr(config, name)}


def _teachers(trainer: Any) -> Iterable[tuple[str, Any]]:
    names = [f"teacher {name!r}" for name in trainer.args.teacher_names] or ["teacher"]
    for name, teacher in zip(names, trainer.teacher.each(), strict=True):
        yield name, _teacher(teacher)


def _teacher(teacher: Teacher) -> str:
    known = teacher.identity()
    if known is not None:
        return known
    return f"{model_name(teacher.model) or 'in memory'} (weights {weights_of(teacher.model)})"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Facts that both have and that differ: name -> (old, new). A fact that only one of two versions of this package
    knows says nothing."""
    return {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}


def in_words(found: Mapping[str, tuple[Any, Any]]) -> str:
    """The differences in one line."""
    return "; ".join(f"{name} {_short(old)} -> {_short(new)}" for name, (old, new) in found.items())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def meetings_of(args: Any) -> dict[str, Any]:
    """Settings that change no weights, but on which ranks must agree, or they wait for each other for ever."""
    values = args.to_dict()
    return plain({name: values.get(name) for name in _MEETINGS.split()})


def check_ranks_agree(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """Compare all ranks' facts with the first's. A collective.

    Raises:
        ValueError: on every rank, when any of them differs.
    """
    if accelerator.num_processes == 1:
        return
    everybody: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everybody, dict(facts))
    for rank, theirs in enumerate(everybody):
        found = differences(everybody[0], theirs)
        if found:
            raise ValueError(
                f"ranks 0 and {rank} were started with different things ({in_words(found)}): start all ranks with the "
                "same command, on the same rows and models"
            )
