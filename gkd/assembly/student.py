"""The student: looked at before its weights are loaded, made ready to be trained, saved as it came."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel, PromptLearningConfig
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import create_model_from_path

from gkd.config.fields import GKDConfig
from gkd.data.token_rows import WRITTEN_BY
from gkd.models.adapters import load_adapter
from gkd.models.fingerprint import fingerprint_at_start
from gkd.models.loading import adapter_config, check_causal, load_config, load_errors_named
from gkd.models.placement import check_not_split

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


def _text_parts(model: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    """Of a model for images or sound and text: its base, the parts that text goes through, and by name what lies
    inside these and text passes over (layers that look at images). No parts for a model for text alone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if not hasattr(base, "get_decoder") or config is None or config.get_text_config() is config:
        return base, [], {}
    decoder = base.get_decoder()
    parts = [part for part in (decoder, base.get_input_embeddings(), base.get_output_embeddings()) if part is not None]
    layers = getattr(decoder, "layers", None)
    name = next((name for name, module in base.named_modules() if module is layers), "")
    crossing = getattr(config.get_text_config(), "cross_attention_layers", None) or ()
    return base, parts, {f"{name}.{i}": decoder.layers[i] for i in crossing}


def freeze_beside_text(model: nn.Module) -> None:
    """Train nothing that text does not reach: DDP would wait for its gradients, and an optimizer keep its moments."""
    base, parts, passed = _text_parts(model)
    if not parts:
        return
    skipped = {id(p) for module in passed.values() for p in module.parameters()}
    reached = {id(p) for part in parts for p in part.parameters()} - skipped
    frozen = [p for p in base.parameters() if p.requires_grad and id(p) not in reached]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if frozen:
        number = sum(getattr(p, "ds_numel", None) or p.numel() for p in frozen)
        logger.info("%s parameters for images or sound are frozen: no text reaches them", f"{number:,}")


def _names_beside_text(model: Any) -> list[str]:
    """The modules that text does not reach, by name, none inside another."""
    base, parts, passed = _text_parts(model)
    reached = {id(module) for part in parts for module in part.modules()}
    above = {id(module) for module in base.modules() if any(id(child) in reached for child in module.modules())}
    beside = [
        f"{name}.{part}".lstrip(".")
        for name, module in base.named_modules()
        if parts and id(module) in above - reached
        for part, child in module.named_children()
        if id(child) not in above
    ]
    return [*beside, *passed]


def adapt_text_only(peft_config: Any, model: Any, config: Any) -> Any:
    """The adapter's configuration, with what text does not reach among its `exclude_modules`.

    Args:
        peft_config: the user's, which is not changed; or None.
        model: the student, or its name. config: its config.
    """
    if peft_config is None or not hasattr(peft_config, "exclude_modules") or config is None:
        return peft_config
    if config.get_text_config() is config:
        return peft_config
    if isinstance(model, str):
        kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        if kind is None:  # code of the model's own: what it has is frozen later
            return peft_config
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
    names = [re.escape(name) for name in _names_beside_text(model)]
    if not names:
        return peft_config
    own = peft_config.exclude_modules or ()
    patterns = [own] if isinstance(own, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in own]
    found = copy.copy(peft_config)
    found.exclude_modules = "|".join([*patterns, rf"(?:{'|'.join(names)})(?:\..*)?"])
    return found


def with_own_adapter(model: Any, args: GKDConfig, peft_config: Any) -> tuple[Any, Any]:
    """A student whose name is an adapter's: its base, loaded, with the adapter on it to be trained on.

    Returns:
        The model and None in the place of `peft_config`, whose values count for new adapters; both as they are for
        any other student.

    Raises:
        ValueError: base or adapter cannot be loaded.
    """
    kwargs: Any = dict(args.model_init_kwargs or {})
    revision = kwargs.pop("revision", None)
    adapter = adapter_config(model, revision) if isinstance(model, str) else None
    if adapter is None:
        return model, peft_config
    base = str(adapter["base_model_name_or_path"])
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    with load_errors_named(f"the base {base!r} of model_name_or_path={model!r}", "name a folder that holds it"):
        student = create_model_from_path(base, revision=adapter.get("revision"), **kwargs)
    sharded = is_deepspeed_zero3_enabled() and not getattr(student, "is_quantized", False)
    found = load_adapter(student, model, "model_name_or_path", trained=True, fp32=not sharded)
    if peft_config is not None:
        _warn_of_other_settings(model, found.active_peft_config, peft_config)
    return found, None


_ABOUT_AN_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping"}


def _warn_of_other_settings(name: str, own: Any, asked: Any) -> None:
    """Warn of what was asked for a new adapter and the one that goes on does not have."""
    differ = []
    for field in sorted(set(vars(own)) & set(vars(asked)) - {*_ABOUT_AN_ADAPTER, "peft_version"}):
        there, here = getattr(own, field), getattr(asked, field)
        resolved = field == "target_modules" and here == "all-linear"
        if not resolved and there != here and (there or here):
            differ.append(f"{field}={here!r} (it has {there!r})")
    if differ:
        logger.warning(
            "the training goes on with the adapter in %s as it is, without %s; for a new adapter name its base, %s",
            name,
            ", ".join(differ),
            own.base_model_name_or_path,
        )


@contextmanager
def already_loaded(args: GKDConfig, loaded: bool) -> Iterator[None]:
    """Keep `SFTTrainer` from warning that a student that we have loaded is not loaded with `model_init_kwargs`."""
    kwargs = args.model_init_kwargs
    if loaded:
        args.model_init_kwargs = None
    try:
        yield
    finally:
        args.model_init_kwargs = kwargs


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


def check_written_by(rows: Any, student: nn.Module) -> None:
    """Refuse rows that another student has written before its training (`gkd precompute --student`). All ranks call
    this.

    Raises:
        ValueError: they are not of the weights that this training begins with.
    """
    if not isinstance(rows, Dataset) or WRITTEN_BY not in rows.column_names:
        return
    own, said = fingerprint_at_start(student), {mark for mark in rows.unique(WRITTEN_BY) if mark is not None}
    if said - {own}:
        raise ValueError(
            f"train_dataset: another student has written these rows (fingerprint {', '.join(sorted(said))[:80]}, and "
            f"this one's is {own}), so they are not its own text: train that student, in the same dtype, or let this "
            f"one write (gkd precompute --student); to train on them as on any data, drop the column {WRITTEN_BY}"
        )
