"""Everything that is loaded by name: tokenizer and teacher (the student is loaded by SFTTrainer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path


def model_name(model: Any) -> str | None:
    """The name or path that a model was loaded from, None for one made in memory."""
    if isinstance(model, str):
        return model
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or None


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        ValueError: there is none under that name; with the remedy.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    except OSError as error:
        raise ValueError(
            f"no tokenizer found at {name!r}: pass processing_class, or save the tokenizer beside the model ({error})"
        ) from error


def vocabulary_rows(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> int:
    """Rows of a model's output head, from its config alone.

    Raises:
        ValueError: there is no model under that name.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    except OSError as error:
        raise ValueError(f"model_name_or_path={name!r} cannot be loaded: {error}") from error
    return int(config.get_text_config().vocab_size)


def safe_weights(name: str, init_kwargs: dict[str, Any] | None, field: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that load safetensors only, unless they say otherwise themselves.

    Older formats are pickles: to load one can be to run a program that somebody has put into it.

    Raises:
        ValueError: a local folder that has only those; with the remedy.
    """
    kwargs = {"use_safetensors": True, **(init_kwargs or {})}
    only_pickles = any(Path(name).glob("pytorch_model*.bin")) and not any(Path(name).glob("*.safetensors"))
    if kwargs["use_safetensors"] and "gguf_file" not in kwargs and only_pickles:
        raise ValueError(
            f"{name!r} holds its weights as a pickle (pytorch_model.bin), which may run any program when it is "
            f"loaded: convert them to safetensors, or, if you trust them, set {field}={{'use_safetensors': False}}"
        )
    return kwargs


def load_teacher(name: str, init_kwargs: dict[str, Any] | None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a teacher; `init_kwargs` is not changed.

    Args:
        name: model name or path.
        init_kwargs: keyword arguments of `from_pretrained`; `dtype` as a string or a `torch.dtype`.
        trust_remote_code: whether code from the model's repository may run; off unless the user says so.

    Raises:
        ValueError: the model is not there or not in safetensors, or `dtype` is not one.
    """
    kwargs = safe_weights(name, init_kwargs, "teacher_model_init_kwargs")
    if "torch_dtype" in kwargs:  # the older spelling
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    dtype = kwargs.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        resolved = getattr(torch, dtype, None)
        if not isinstance(resolved, torch.dtype):
            raise ValueError(
                f"teacher_model_init_kwargs: dtype={dtype!r} is no torch dtype: use 'auto', 'bfloat16' or 'float32'"
            )
        kwargs["dtype"] = resolved
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    kwargs.setdefault("dtype", "auto")  # as saved: a bfloat16 teacher is not blown up to float32
    kwargs.setdefault("device_map", None)  # placed later: on this rank, or sharded
    try:
        return create_model_from_path(name, **kwargs)
    except OSError as error:
        raise ValueError(f"teacher_model_name_or_path={name!r} cannot be loaded: {error}") from error
