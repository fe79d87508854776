"""Data sets prepared as the fields say: the one caller of `prepare_dataset` that has a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gkd.config.fields import GKDConfig
from gkd.data.prepare import prepare_dataset
from gkd.data.sequences import PaddingCollator, prompt_of


def row_options(args: GKDConfig) -> dict[str, Any]:
    """What the fields say of any rows, by the names of `prepare_dataset`."""
    return {
        "max_length": args.max_length,
        "max_prompt_length": args.prompt_limit,
        "overlong_prompt": args.overlong_prompt,
        "overlong_row": args.overlong_row,
        "assistant_turns": args.assistant_turns,
        "unanswered_rows": args.unanswered_rows,
        "num_proc": args.dataset_num_proc,
        "teachers": args.teacher_names,
    }


def train_options(args: GKDConfig) -> dict[str, Any]:
    """What they say of the train rows beside: whether answers are read, and prompts."""
    return {
        "prompt_only_ok": not args.reads_answers,
        "prompts_needed": args.student_writes or args.teacher_writes,
    }


def prepare_rows(
    args: GKDConfig,
    tokenizer: PreTrainedTokenizerBase,
    encoding: dict[str, Any],
    *,
    train: Dataset | None = None,
    evaluation: Dataset | dict[str, Dataset] | None = None,
    formatting_func: Callable[..., Any] | None = None,
    collator: Any = None,
) -> tuple[Dataset | None, Any, Any]:
    """Tokenize the data sets and make their collator. With a foreign collator the data sets pass as they are.

    `encoding` is what `encoding_options` gives.

    Raises:
        ValueError: rows that cannot be used; see `gkd.data.prepare.prepare_dataset`.
    """
    if collator is not None and not isinstance(collator, PaddingCollator):
        if args.teacher_names:
            raise ValueError(
                "teacher_adapters does not go with a data_collator of your own, which does not say whose a row is: "
                "leave one of them out"
            )
        if args.teacher_tokenizer_alignment is not None:
            raise ValueError(
                f"teacher_tokenizer_alignment={args.teacher_tokenizer_alignment!r} does not go with a data_collator "
                "of your own, which does not say what the teacher reads: leave one of them out"
            )
        if encoding["reading"].differs:
            raise ValueError(
                "teacher_view and teacher_template='own' do not go with a data_collator of your own, which does not "
                "say what the teacher reads: leave one of them out"
            )
        return train, evaluation, collator
    common = {**row_options(args), "formatting_func": formatting_func, **encoding}
    if train is not None:
        with args.main_process_first(desc="preparing the train data set"):  # the others read its cache
            train, _ = prepare_dataset(train, tokenizer, name="train", **train_options(args), **common)
        if args.shuffle_dataset:
            train = train.shuffle(seed=args.seed)

    def prepare_evaluation(rows: Dataset, name: str) -> Dataset:
        with args.main_process_first(desc=f"preparing the {name} data set"):
            ready, _ = prepare_dataset(
                rows, tokenizer, prompt_only_ok=False, prompts_needed=False, name=name, **common
            )
        # As text, too: what TRL's LogCompletionsCallback continues.
        prompts = [tokenizer.decode(prompt_of(row)) for row in ready]
        return ready.add_column("prompt", prompts)

    if isinstance(evaluation, dict):
        evaluation = {name: prepare_evaluation(rows, name) for name, rows in evaluation.items()}
    elif evaluation is not None:
        evaluation = prepare_evaluation(evaluation, "eval")
    return train, evaluation, PaddingCollator(int(tokenizer.pad_token_id), args.pad_to_multiple_of)
