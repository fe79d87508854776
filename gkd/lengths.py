"""Do the sequences fit into the models' positions? Asked before the first step, and of every rollout's prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from gkd.config import GKDConfig

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 10_000


def positions(config: Any) -> tuple[int | None, bool]:
    """How many positions a model has, and whether that binds.

    Args:
        config: a transformers config.

    Returns:
        The number in `max_position_embeddings`, None where the config has none; False with rotary positions that are
        stretched (`rope_parameters` of another type than "default", YaRN for example: Qwen2.5's configs name the
        number before the stretching) and with ALiBi, where longer sequences are what the model is made for.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    room = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    stretched = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) != "default"
    binds = not (stretched or getattr(text, "alibi", False))
    return (int(room) if isinstance(room, int) and room > 0 else None), binds


def check_lengths(args: GKDConfig, models: Mapping[str, Any], rows: Dataset | None) -> None:
    """Compare the longest sequence that will be trained on with every model's positions.

    Args:
        models: "student" and "teacher", those that are in this process.
        rows: the prepared training rows. They are looked at only when what the fields allow does not fit.

    Raises:
        ValueError: a prompt with its rollout, or a row, is longer than a model can take.
    """
    rooms = {who: positions(model.config) for who, model in models.items() if getattr(model, "config", None)}
    known = {who: (room, binds) for who, (room, binds) in rooms.items() if room is not None}
    generates = args.student_writes or args.teacher_writes
    bounds_rollouts = args.max_length is None or args.max_prompt_length or args.max_length > args.max_new_tokens
    if generates and not bounds_rollouts:
        logger.warning(
            "max_length=%d is no more than max_new_tokens=%d, so it bounds prompts and the data's rows alone: with "
            "its rollout, a sequence may have %d tokens; for less set max_prompt_length or lower max_new_tokens",
            args.max_length,
            args.max_new_tokens,
            args.max_length - 1 + args.max_new_tokens,
        )
    with_rollout = None if args.prompt_limit is None else args.prompt_limit + args.max_new_tokens
    allowed = [with_rollout if generates else 0, args.max_length if args.reads_answers else 0]
    smallest = min((room for room, _ in known.values()), default=None)
    if smallest is None or all(size is not None and size <= smallest for size in allowed):
        return
    if rows is None or not {"input_ids", "prompt_length"} <= set(rows.column_names):
        return  # a foreign collator: its sequences are not known here
    prompt, row = _longest(rows)
    for who, (room, binds) in known.items():
        if generates and prompt + args.max_new_tokens > room:
            text = (
                f"max_new_tokens={args.max_new_tokens}: with the longest prompt, of {prompt} tokens, that makes "
                f"{prompt + args.max_new_tokens}, and the {who} has {room} positions (max_position_embeddings)"
            )
            _tell(text, "lower max_new_tokens or max_prompt_length, or take a model for longer texts", binds)
        if args.reads_answers and row > room:
            text = (
                f"max_length={args.max_length}: the longest row has {row} tokens, and the {who} has {room} positions "
                "(max_position_embeddings)"
            )
            _tell(text, f"set max_length={room}, or take a model for longer texts", binds)


def _tell(text: str, remedy: str, binds: bool) -> None:
    if binds:
        raise ValueError(f"{text}: {remedy}")
    logger.warning("%s; its positions are stretched, so it goes on: see that the model is good at this length", text)


def _longest(rows: Dataset) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest row."""
    prompt, row = 0, 0
    columns = ["input_ids", "prompt_length", "prompt_ids"]
    for batch in rows.select_columns(columns).with_format("arrow").iter(_ROWS_AT_A_TIME):
        own = pc.max(pc.list_value_length(batch.column("prompt_ids"))).as_py() or 0
        prompt = max(prompt, own, pc.max(batch.column("prompt_length")).as_py() or 0)
        row = max(row, pc.max(pc.list_value_length(batch.column("input_ids"))).as_py() or 0)
    return prompt, row
