"""From the configuration to the objects that do the work; past this point nobody sees a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gkd.config import GKDConfig
from gkd.data import PaddingCollator, prepare_dataset
from gkd.fused import LossSettings
from gkd.rollouts.base import SamplingSettings


def prepare_rows(
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    tokenizer: PreTrainedTokenizerBase,
    args: GKDConfig,
    formatting_func: Callable[..., Any] | None,
    data_collator: Any,
) -> tuple[Dataset | None, Any, Any]:
    """Tokenize the data sets and make their collator. With a foreign collator the data sets pass as they are.

    Raises:
        ValueError: rows that cannot be used; see `gkd.data.prepare_dataset`.
    """
    if data_collator is not None and not isinstance(data_collator, PaddingCollator):
        return train_dataset, eval_dataset, data_collator
    generates = args.lmbda > 0 or args.seq_kd
    common: dict[str, Any] = {
        "max_length": args.max_length,
        "max_prompt_length": args.prompt_limit,
        "overlong_prompt": args.overlong_prompt,
        "overlong_row": args.overlong_row,
        "assistant_turns": args.assistant_turns,
        "num_proc": args.dataset_num_proc,
        "formatting_func": formatting_func,
    }
    if train_dataset is not None:
        needs_no_data = args.lmbda == 1 or args.seq_kd
        train_dataset, _ = prepare_dataset(
            train_dataset, tokenizer, prompt_only_ok=needs_no_data, prompts_needed=generates, name="train", **common
        )
        if args.shuffle_dataset:
            train_dataset = train_dataset.shuffle(seed=args.seed)

    def prepare_evaluation(rows: Dataset, name: str) -> Dataset:
        return prepare_dataset(rows, tokenizer, prompt_only_ok=False, prompts_needed=False, name=name, **common)[0]

    if isinstance(eval_dataset, dict):
        eval_dataset = {name: prepare_evaluation(rows, name) for name, rows in eval_dataset.items()}
    elif eval_dataset is not None:
        eval_dataset = prepare_evaluation(eval_dataset, "eval")
    return train_dataset, eval_dataset, PaddingCollator(int(tokenizer.pad_token_id), args.pad_to_multiple_of)


def sampling_settings(args: GKDConfig, stop_ids: tuple[int, ...], pad_id: int) -> SamplingSettings:
    """How rollouts are sampled, complete."""
    extra = args.generation_kwargs or {}
    assert not isinstance(extra, str)  # TrainingArguments has parsed it
    return SamplingSettings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop_ids=stop_ids,
        pad_id=pad_id,
        extra=dict(extra),
    )


def loss_settings(args: GKDConfig, shared_vocab: int | None) -> LossSettings:
    """What the fused divergence computes."""
    return LossSettings(
        divergence=args.make_divergence(),
        loss_temperature=args.loss_temperature,
        teacher_loss_temperature=args.teacher_loss_temperature,
        scale_by_temperature_squared=args.scale_by_temperature_squared,
        teacher_top_k=args.teacher_top_k,
        top_k_tail=args.top_k_tail,
        shared_vocab=shared_vocab,
        chunk_size=args.loss_chunk_size,
    )
