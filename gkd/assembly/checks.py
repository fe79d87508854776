"""Models, rows and settings checked against each other before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from gkd.config.fields import GKDConfig
from gkd.data.sequences import columns_read
from gkd.data.vocabulary import compare_chat_templates, compare_stop_ids
from gkd.models.facts import position_limit
from gkd.models.zero import zero_stage
from gkd.servers.checks import Server

logger = logging.getLogger(__name__)


def check_not_quantized(model: Any, role: str, accelerator: Accelerator) -> None:
    """Refuse quantized weights under ZeRO-3, which would split up packed bytes.

    Raises:
        ValueError: they are.
    """
    if zero_stage(accelerator) == 3 and getattr(model, "is_quantized", False):
        raise ValueError(
            f"the {role} is quantized, which ZeRO-3 cannot split up: load it in bfloat16, or use DDP or ZeRO-2"
        )


def check_steps(args: GKDConfig, rows: Any, split_batches: bool) -> None:
    """Refuse a data set of which no batch is left.

    Args:
        rows: the prepared train rows. split_batches: a batch is shared out over the ranks.

    Raises:
        ValueError: fewer rows than one batch, with dataloader_drop_last.
    """
    if rows is None or not args.dataloader_drop_last:
        return
    batch, ranks = args.per_device_train_batch_size // args.num_completions, 1 if split_batches else args.world_size
    if len(rows) < batch * ranks:
        size = args.per_device_train_batch_size
        each = f"{size} x {ranks} processes" if ranks > 1 else f"{size}"
        raise ValueError(
            f"dataloader_drop_last=True with {len(rows)} usable rows and per_device_train_batch_size={each}: no batch "
            "is full, so no step would be made. Set dataloader_drop_last=False, or a smaller batch"
        )


def _without_noise(module: nn.Module, _inputs: Any) -> None:
    module.training = False


def warn_of_differences(
    stop_ids: dict[str, tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    name: str | None = None,
) -> None:
    """Warn when the teacher stops elsewhere than the student, or knows chats in another form: both make on-policy
    training drift, and neither shows in the loss. `name` is the teacher's, of several."""
    remarks = [compare_stop_ids(stop_ids["student"], stop_ids["teacher"], tokenizer)]
    if teacher_tokenizer is not None:
        remarks.append(compare_chat_templates(tokenizer, teacher_tokenizer))
    for remark in remarks:
        if remark:
            logger.warning("%s%s", "" if name is None else f"teachers[{name!r}]: ", remark)


_ROWS_AT_A_TIME = 10_000


def check_lengths(args: GKDConfig, models: Mapping[str, Any], rows: Dataset | None) -> None:
    """Compare the longest sequence that will be trained on with every model's positions.

    Args:
        models: "student" and "teacher", those that are in this process.
        rows: the prepared training rows. They are looked at only when what the fields allow does not fit.

    Raises:
        ValueError: a prompt with its rollout, or a row, is longer than a model can take.
    """
    rooms = {who: position_limit(model.config) for who, model in models.items() if getattr(model, "config", None)}
    known = {who: (room, binds) for who, (room, binds) in rooms.items() if room is not None}
    generates = args.student_writes or args.teacher_writes
    bounds_rollouts = args.max_length is None or args.max_prompt_length or args.max_length > args.most_new_tokens
    if generates and not bounds_rollouts:
        logger.warning(
            "max_length=%d is no more than max_new_tokens=%d, so it bounds prompts and the data's rows alone: with "
            "its rollout, a sequence may have %d tokens; for less set max_prompt_length or lower max_new_tokens",
            args.max_length,
            args.most_new_tokens,
            args.max_length - 1 + args.most_new_tokens,
        )
    with_rollout = None if args.prompt_limit is None else args.prompt_limit + args.most_new_tokens
    allowed = [with_rollout if generates else 0, args.max_length if args.reads_answers else 0]
    smallest = min((room for room, _ in known.values()), default=None)
    if smallest is None or all(size is not None and size <= smallest for size in allowed):
        return
    if rows is None or not {"input_ids", "prompt_length"} <= set(rows.column_names):
        return  # a foreign collator: its sequences are not known here
    if _has_views(rows):
        known.pop("teacher", None)  # see `check_views`
    prompt, row = _longest(rows, "student")
    for who, (room, binds) in known.items():
        if generates and prompt + args.most_new_tokens > room:
            text = (
                f"max_new_tokens={args.most_new_tokens}: with the longest prompt, of {prompt} tokens, that makes "
                f"{prompt + args.most_new_tokens}, and the {who} has {room} positions (max_position_embeddings)"
            )
            _raise_or_warn(text, "lower max_new_tokens or max_prompt_length, or take a model for longer texts", binds)
        if args.reads_answers and row > room:
            text = (
                f"max_length={args.max_length}: the longest row has {row} tokens, and the {who} has {room} positions "
                "(max_position_embeddings)"
            )
            _raise_or_warn(text, f"set max_length={room}, or take a model for longer texts", binds)


def check_views(
    args: GKDConfig, train: Dataset | None, evaluation: Iterable[Dataset], teacher: Any, server: Server | None
) -> None:
    """Compare the longest sequence that the teacher reads, where it has prompts of its own, with what it can take. One
    with other tokens that is compared writes as much as that; of what it reads, the rest is not compared
    (`gkd.data.aligned_view`).

    Args:
        train, evaluation: the prepared rows.
        teacher: the model, or None; server: where it is, or None.

    Raises:
        ValueError: it is longer.
    """
    needed, aligned = 0, args.teacher_tokenizer_alignment is not None
    if train is not None and _has_views(train):
        prompt, row = _longest(train, "teacher")
        writes = args.teacher_writes or (args.student_writes and not aligned)
        needed = max(prompt + args.most_new_tokens if writes else 0, row if args.reads_answers and not aligned else 0)
    if not aligned:
        needed = max([needed, *(_longest(rows, "teacher")[1] for rows in evaluation if _has_views(rows))])
    if needed == 0:
        return
    text = f"with prompts of its own the teacher reads up to {needed} tokens"
    remedy = "give it shorter ones (teacher_prompt, teacher_system, teacher_view), or lower max_new_tokens"
    room = None if server is None else server.served.max_model_len
    if room is not None and needed + 1 > room:  # a server writes at least one token
        raise ValueError(
            f"{text}, and teacher_server_url takes max_model_len={room}: start it with --max-model-len {needed + 1}, "
            f"or {remedy}"
        )
    positions, binds = position_limit(teacher.config) if getattr(teacher, "config", None) else (None, True)
    if positions is not None and needed > positions:
        _raise_or_warn(f"{text}, and it has {positions} positions (max_position_embeddings)", remedy, binds)


def _raise_or_warn(text: str, remedy: str, binds: bool) -> None:
    if binds:
        raise ValueError(f"{text}: {remedy}")
    logger.warning("%s; its positions are stretched, so it goes on: see that the model is good at this length", text)


def _has_views(rows: Any) -> bool:
    return hasattr(rows, "column_names") and bool({"teacher_context", "teacher_prompt_ids"} & set(rows.column_names))


def _longest(rows: Dataset, who: str) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest row, as the student or the teacher reads them."""
    prompt, row = 0, 0
    for batch in columns_read(rows).with_format("arrow").iter(_ROWS_AT_A_TIME):
        length, start = _lengths(batch, "input_ids"), np.asarray(batch.column("prompt_length"))
        prompts = np.maximum(start, _lengths(batch, "prompt_ids"))
        if who == "teacher" and _has_views(rows):
            context = _lengths(batch, "teacher_context")
            length = np.where(context > 0, context + length - start, length)
            own = np.maximum(context, _lengths(batch, "teacher_prompt_ids"))
            prompts = np.where(own > 0, own, prompts)
        prompt, row = max(prompt, int(prompts.max(initial=0))), max(row, int(length.max(initial=0)))
    return prompt, row


def _lengths(batch: Any, column: str) -> Any:
    """Length of each row's list; 0 in a column that is not there."""
    if column not in batch.column_names:
        return np.zeros(len(batch), dtype=np.int64)
    return np.asarray(pc.fill_null(pc.list_value_length(batch.column(column)), 0))
