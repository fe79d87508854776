"""The student: looked at before its weights are loaded, made ready to be trained, saved as it came."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PromptLearningConfig
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from gkd.config import GKDConfig
from gkd.launch_checks import check_not_split
from gkd.loading import check_causal, load_config

logger = logging.getLogger(__name__)


def check_named(model: Any, args: GKDConfig) -> Any:
    """The student's config, read before the weights when it is given by name.

    Raises:
        ValueError: there is none under that name; it is not the config of a causal language model; the student is a
            model that stands on several devices.
    """
    config: Any = getattr(model, "config", None)
    if isinstance(model, str):
        kwargs: Any = args.model_init_kwargs
        config = kwargs.get("config") or load_config(
            model,
            trust_remote_code=kwargs.get("trust_remote_code", args.trust_remote_code),
            **{name: kwargs[name] for name in ("revision", "subfolder", "token", "cache_dir") if kwargs.get(name)},
        )
    check_causal(config if isinstance(model, str) else model, "student")
    check_not_split(model, "student")
    return config


_NOT_THERE = object()


def use_cache_of(config: Any) -> Any:
    """What a config says about the cache; `keep_use_cache` writes it back."""
    return getattr(config, "use_cache", _NOT_THERE)


def keep_use_cache(model: Any, args: GKDConfig, before: Any) -> None:
    """Undo what the Trainer writes into the student's config, and so into the saved one: the training passes
    `use_cache=False` itself, and whoever loads the result wants what the student had."""
    config = getattr(model, "config", None)
    if config is None or args.use_cache:
        return
    if before is not _NOT_THERE:
        config.use_cache = before
    elif hasattr(config, "use_cache"):
        del config.use_cache


@contextmanager
def student_named(model: Any) -> Iterator[None]:
    """Say which model it is that cannot be loaded.

    Raises:
        ValueError: a student, given by name, without weights, or with broken ones.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not isinstance(model, str) or (isinstance(error, OSError) and error.errno is not None):
            raise  # of something else: the file system, say, and it names the file
        raise ValueError(f"model_name_or_path={model!r} cannot be loaded: {error}") from error


def check_student(model: nn.Module) -> None:
    """Refuse students whose training this trainer cannot honour.

    Raises:
        ValueError: a prompt-learning adapter; nothing that would be trained.
    """
    if isinstance(model, PeftModel):
        for name, config in model.peft_config.items():
            if isinstance(config, PromptLearningConfig):
                raise ValueError(
                    f"adapter {name!r} is {config.peft_type}: prompt-learning adapters add virtual tokens that have "
                    "no label and no teacher score; use LoRA"
                )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        remedy = "call requires_grad_(True) on what should be trained, or pass a peft_config"
        if isinstance(model, PeftModel):
            remedy = "load it with PeftModel.from_pretrained(model, folder, is_trainable=True)"
        raise ValueError(
            f"the student is frozen: no parameter requires a gradient, so nothing would be trained; {remedy}"
        )


def warn_of_half_precision(model: nn.Module, stage: int) -> None:
    """Warn of full fine-tuning in 16 bits without fp32 master weights, where most small updates are rounded away."""
    if stage or isinstance(model, PeftModel):
        return
    half = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    for dtype in sorted(map(str, half & {torch.bfloat16, torch.float16})):
        logger.warning(
            "the student is fine-tuned in full with weights in %s: an update that is smaller than half of a weight's "
            "last bit is lost, and at usual learning rates most are. Load it in float32 (dtype; bf16=True still "
            "computes in bfloat16), train an adapter (--use_peft), or use DeepSpeed, which keeps fp32 weights beside",
            dtype.removeprefix("torch."),
        )


def align_pad_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's pad token in the model's configs, as TRL's trainers have it from construction on."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
