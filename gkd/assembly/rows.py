"""From the configuration to the objects that do the work; past this point nobody sees a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gkd.config.fields import GKDConfig
from gkd.data.prepare import prepare_dataset
from gkd.data.sequences import PaddingCollator, prompt_of


def prepare_rows(
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    tokenizer: PreTrainedTokenizerBase,
    args: GKDConfig,
    formatting_func: Callable[..., Any] | None,
    data_collator: Any,
    encoding: dict[str, Any],
) -> tuple[Dataset | None, Any, Any]:
    """Tokenize the data sets and make their collator. With a foreign collator the data sets pass as they are.

    `encoding` is what `encoding_options` gives.

    Raises:
        ValueError: rows that cannot be used; see `gkd.data.prepare.prepare_dataset`.
    """
    if data_collator is not None and not isinstance(data_collator, PaddingCollator):
        if args.teacher_names:
            raise ValueError(
                "teacher_adapters does not go with a data_collator of your own, which does not say whose a row is: "
                "leave one of them out"
            )
        return train_dataset, eval_dataset, data_collator
    generates = args.student_writes or args.teacher_writes
    common: dict[str, Any] = {
        "max_length": args.max_length,
        "max_prompt_length": args.prompt_limit,
        "overlong_prompt": args.overlong_prompt,
        "overlong_row": args.overlong_row,
        "assistant_turns": args.assistant_turns,
        "unanswered_rows": args.unanswered_rows,
        "num_proc": args.dataset_num_proc,
        "formatting_func": formatting_func,
        "teachers": args.teacher_names,
        **encoding,
    }
    if train_dataset is not None:
        with args.main_process_first(desc="preparing the train data set"):  # the others read its cache
            train_dataset, _ = prepare_dataset(
                train_dataset,
                tokenizer,
                prompt_only_ok=not args.reads_answers,
                prompts_needed=generates,
                name="train",
                **common,
            )
        if args.shuffle_dataset:
            train_dataset = train_dataset.shuffle(seed=args.seed)

    def prepare_evaluation(rows: Dataset, name: str) -> Dataset:
        with args.main_process_first(desc=f"preparing the {name} data set"):
            ready, _ = prepare_dataset(
                rows, tokenizer, prompt_only_ok=False, prompts_needed=False, name=name, **common
            )
        # As text, too: what TRL's LogCompletionsCallback continues.
        prompts = [tokenizer.decode(prompt_of(row)) for row in ready]
        return ready.add_column("prompt", prompts)

    if isinstance(eval_dataset, dict):
        eval_dataset = {name: prepare_evaluation(rows, name) for name, rows in eval_dataset.items()}
    elif eval_dataset is not None:
        eval_dataset = prepare_evaluation(eval_dataset, "eval")
    return train_dataset, eval_dataset, PaddingCollator(int(tokenizer.pad_token_id), args.pad_to_multiple_of)
