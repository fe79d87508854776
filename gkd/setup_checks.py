"""What is checked or switched off before the first step, so that nothing is silently wrong later."""

from __future__ import annotations

import logging
from typing import Any

from peft import PeftModel, PromptLearningConfig
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments

from gkd.config import GKDConfig

logger = logging.getLogger(__name__)


def resolve_config(args: Any, model: Any) -> GKDConfig:
    """`args`, or the defaults when it is None.

    Raises:
        TypeError: some other kind of arguments, which would lack the distillation fields.
    """
    if args is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None) or (
            model if isinstance(model, str) else ""
        )
        return GKDConfig(output_dir=f"{str(name).rstrip('/').split('/')[-1] or 'model'}-GKD")
    if not isinstance(args, GKDConfig):
        kind = "a plain TrainingArguments" if isinstance(args, TrainingArguments) else "no training arguments at all"
        raise TypeError(f"args is {type(args).__name__}, {kind}: pass a gkd.GKDConfig")
    return args


def check_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token.

    Raises:
        ValueError: a processor with images; only text is supported.
        TypeError: not a tokenizer.
    """
    if isinstance(tokenizer, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(tokenizer).__name__} (images or audio): only text is supported, "
            "pass its .tokenizer and a text-only model"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class is {type(tokenizer).__name__}: pass a tokenizer")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a pad nor an eos token: set tokenizer.eos_token")
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so sharing the id is harmless
    return tokenizer


def check_student(model: nn.Module) -> None:
    """Refuse adapters whose training this trainer cannot honour.

    Raises:
        ValueError: a prompt-learning adapter.
    """
    if isinstance(model, PeftModel):
        for name, config in model.peft_config.items():
            if isinstance(config, PromptLearningConfig):
                raise ValueError(
                    f"adapter {name!r} is {config.peft_type}: prompt-learning adapters add virtual tokens that have "
                    "no label and no teacher score; use LoRA"
                )


def disable_dropout(model: nn.Module) -> None:
    """Turn the model's own dropout off, in modules and in the probabilities that attention functions read.

    A LoRA adapter's `lora_dropout` is the user's choice and stays.
    """
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


def refuse_same_model(student: Any, teacher: Any) -> None:
    """Refuse one object as both models: freezing the teacher would freeze the student.

    Raises:
        ValueError: always, when they are one object.
    """
    if student is teacher:
        raise ValueError(
            "model and teacher_model are the same object: freezing the teacher would freeze the student; "
            "pass a copy (copy.deepcopy) or the teacher's name"
        )
