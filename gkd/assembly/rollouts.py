"""Who writes: the rollouts of student and teacher, and what of them is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedTokenizerBase

from gkd.common.environment import installed_versions
from gkd.config.fields import GKDConfig
from gkd.config.settings import sampling_settings
from gkd.data.teacher_rows import TeacherReading
from gkd.data.template_day import template_day
from gkd.data.vocabulary import configured_stop_ids
from gkd.models.facts import key_width, model_name, revision_of
from gkd.models.fingerprint import fingerprint
from gkd.models.loading import generation_config_of
from gkd.rollouts.base import Rollout, RolloutOrder, backend
from gkd.rollouts.batch_size import rollout_rows
from gkd.rollouts.chat import ChatRollout
from gkd.rollouts.kept import KeptRollout, key_of
from gkd.rollouts.store import open_store
from gkd.servers.chat import ChatServer
from gkd.servers.checks import Server
from gkd.teachers.absent import AbsentTeacher, as_absent


def encoding_options(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: GKDConfig,
    options: Any = None,
    *,
    reading: TeacherReading,
    write: bool = True,
) -> dict[str, Any]:
    """What `prepare_dataset` needs to know of the student, of its teachers and of the day.

    Args:
        model: the student, or its name.
        options: that it is loaded with.
        reading: how teachers read the rows.
        write: whether the day may be kept for later runs.
    """
    config = generation_config_of(model, options if isinstance(options, dict) else None)
    with args.main_process_first(desc="reading the day of the chat template"):
        owns = (own.tokenizer for own in reading.own[:1] if own is not None)
        writers = [tokenizer, *(own for own in owns if own is not None)]
        days = (template_day(args, writer, write) for writer in writers)
        today = next((day for day in days if day is not None), None)
    return {"stop_ids": configured_stop_ids(config), "today": today, "reading": reading}


def rows_at_a_time(args: GKDConfig, config: Any, device: torch.device) -> int:
    """`rollout_batch_size`, or what goes well on this device with a model of this config."""
    if args.rollout_batch_size is not None:
        return args.rollout_batch_size
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    tokens = args.max_length or (args.prompt_limit or 1024) + args.most_new_tokens
    layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0))
    row_bytes = 2 * layers * key_width(config) * tokens * (2 if args.bf16 or args.fp16 else 4)
    batch = args.per_device_train_batch_size
    window = batch * args.gradient_accumulation_steps * args.rollout_every
    return rollout_rows(batch, window, row_bytes, room)


@dataclass(frozen=True)
class Writer:
    """Who writes a source's completions, and with which tokens.

    Args:
        source: "student" or "teacher".
        get_model: gives the model, wrapped as it is trained.
        stop_ids: they end a completion. pad_id: both models can read it.
        foreign_ids: never written; see `sampling_settings`.
        server: writes in the model's place: the student through its adapter, the teacher as the server's own model.
        vocabulary: rows of the student's head, beyond which a server's tokens are refused.
        absent: a teacher that is not loaded: its model is not asked for, only its fingerprint.
    """

    source: str
    get_model: Callable[[], nn.Module]
    stop_ids: tuple[int, ...]
    pad_id: int
    foreign_ids: range = range(0)
    server: Server | ChatServer | None = None
    vocabulary: int | None = None
    absent: AbsentTeacher | None = None


def make_rollout(args: GKDConfig, writer: Writer, accelerator: Accelerator) -> Rollout:
    """The backend that writes a source's completions; the teacher's are kept, when any are wanted.

    Under ZeRO-3 all ranks call this: the fingerprint of the teacher gathers its weights.
    """
    source, server = writer.source, writer.server
    order = RolloutOrder(
        settings=sampling_settings(args, source, writer.stop_ids, writer.pad_id, writer.foreign_ids),
        get_model=writer.get_model,
        accelerator=accelerator,
        seed=args.seed,
        source=source,
        batch_size=args.rollout_batch_size or partial(rows_at_a_time, args),
        fold_adapter=args.fold_adapter,
        server=server,
        adapter_dir=args.rollout_adapter_folder,
        vocabulary=writer.vocabulary,
        log_probs=source == "student" and args.rollout_logprob_tolerance > 0,
        num_completions=args.num_completions if source == "student" else 1,
        shares_device=source == "student" and args.rollout_server_sharing is not None,
    )
    # The teacher writes where it is.
    name = args.rollout_backend if source == "student" else "hf" if server is None else "vllm"
    rollout = ChatRollout.of(order) if isinstance(server, ChatServer) else backend(name).of(order)
    if source != "teacher" or args.teacher_cache_folder is None or not args.teacher_writes:
        return rollout
    return keep_completions(rollout, args, server or writer.absent or writer.get_model(), accelerator)


def keep_completions(
    rollout: Rollout, args: GKDConfig, model: nn.Module | Server | ChatServer | AbsentTeacher, accelerator: Accelerator
) -> KeptRollout:
    """A rollout of the frozen `model` (a server's is known by its name only) that samples each prompt once and
    keeps the completion on disk.

    Under ZeRO-3 all ranks call this: the fingerprint gathers the weights.

    Raises:
        ValueError: `teacher_cache_dir` is off, or an option of the sampling cannot be compared between runs.
    """
    folder = args.teacher_cache_folder
    if folder is None:
        raise ValueError(f"teacher_cache_dir={args.teacher_cache_dir!r} leaves no place to keep completions: name one")
    name: str | None
    if isinstance(model, Server | ChatServer):
        mark, name, revision = model.fingerprint, model.name, None
    else:
        absent = as_absent(model)
        teacher: Any = absent or extract_model_from_parallel(model)
        mark = fingerprint(teacher) if absent is None else absent.fingerprint
        name, revision = model_name(teacher), revision_of(teacher, args.teacher_model_init_kwargs)
    key = key_of(rollout.settings, args.seed, mark)
    notes = {"teacher": name, "revision": revision, "versions": installed_versions()}
    return KeptRollout(rollout, open_store(folder, key, notes), accelerator)
