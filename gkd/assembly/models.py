"""Names become models and tokenizer: what the fields say of the config, the teacher and the tokenizer, resolved."""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from gkd.assembly.checks import _without_noise
from gkd.config.fields import GKDConfig
from gkd.data.tokenizer import apply_options, check_tokenizer
from gkd.models.adapters import with_adapter
from gkd.models.facts import model_name
from gkd.models.loading import base_name, check_causal, load_teacher, load_tokenizer, safe_weights
from gkd.models.placement import check_not_split, check_placement
from gkd.models.quantized import with_quantization
from gkd.teachers.absent import Loading, find_teacher

logger = logging.getLogger(__name__)


def resolve_config(args: Any, model: Any, quantization_config: Any = None) -> GKDConfig:
    """A copy of `args`, or of the defaults when it is None, with what a student that is given by name is loaded with.
    The training, TRL and transformers write into that copy; the user's stays as it is.

    Raises:
        TypeError: some other kind of arguments, which would lack the distillation fields.
        ValueError: a quantization that would have no effect, or is given twice.
    """
    if args is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None) or (
            model if isinstance(model, str) else ""
        )
        args = GKDConfig(output_dir=f"{str(name).rstrip('/').split('/')[-1] or 'model'}-GKD")
    if not isinstance(args, GKDConfig):
        kind = "a plain TrainingArguments" if isinstance(args, TrainingArguments) else "no training arguments at all"
        raise TypeError(f"args is {type(args).__name__}, {kind}: pass a gkd.GKDConfig")
    args = copy.copy(args)
    if isinstance(model, str):
        assert not isinstance(args.model_init_kwargs, str)  # TrainingArguments has parsed it
        kwargs = safe_weights(base_name(model), args.model_init_kwargs, "model_init_kwargs")
        if quantization_config is not None:
            if kwargs.get("quantization_config") is not None:
                raise ValueError("quantization_config is given twice: leave it out of model_init_kwargs")
            asked = {"quantization_config": quantization_config}
            kwargs |= with_quantization(asked, torch.float32, "quantization_config")
        args.model_init_kwargs = {"device_map": None, **kwargs}  # TRL's "auto" would spread it over all GPUs
    elif quantization_config is not None:
        raise ValueError(
            "quantization_config has no effect: the student is already a model; load it with quantization_config, or "
            "pass the student by name"
        )
    return args


def disable_dropout(model: nn.Module) -> None:
    """Turn the model's own noise off: dropout in modules and in the probabilities that attention functions read, and
    the noise of routers, which chooses other experts at random (`jitter`; without it they run as when they generate).

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
        # The same number also bounds which experts are looked at (PhiMoE): it stays, and the module's own flag goes.
        if any("jitter" in attribute and isinstance(value, float) for attribute, value in vars(module).items()):
            module.register_forward_pre_hook(_without_noise)


def resolve_teacher(student: Any, teacher: Any, args: GKDConfig) -> Any:
    """The teacher as a model; loads it by name, unless its scores are known to be on disk (`AbsentTeacher`). None when
    it is on a server or shares the student's base, or when there is none and training asks for nothing.

    Raises:
        ValueError: there is no teacher, it is the student itself, or its loading arguments would have no effect.
    """
    for field in ("teacher_server_url", "teacher_chat_url"):
        if getattr(args, field) is not None:
            if teacher is not None:
                raise ValueError(f"teacher_model does not go with args.{field}: one of them is the teacher")
            return None
    if args.self_teacher is not None and teacher is not None:
        raise ValueError(
            f"teacher_model does not go with self_teacher={args.self_teacher!r}, where the student teaches itself: "
            "leave one of them out"
        )
    if args.shares_weights:
        _check_same_base(student, teacher, args)
        return None
    if student is teacher and not isinstance(student, str):  # one name is loaded twice
        raise ValueError(
            "model and teacher_model are the same object: freezing the teacher would freeze the student; "
            "pass a copy (copy.deepcopy) or the teacher's name"
        )
    if teacher is None:
        teacher = args.teacher_model_name_or_path
    if teacher is None and not args.needs_teacher:
        return None
    if teacher is None:
        raise ValueError(
            "there is no teacher: pass teacher_model (a model or a name) or set args.teacher_model_name_or_path "
            "or args.teacher_server_url"
        )
    check_placement(args.teacher_placement, args.world_size, is_deepspeed_zero3_enabled())
    kwargs = args.teacher_model_init_kwargs
    if isinstance(teacher, str):
        assert not isinstance(kwargs, str)  # TrainingArguments has parsed it
        load = partial(
            load_teacher,
            teacher,
            kwargs,
            trust_remote_code=args.trust_remote_code,
            placement=args.teacher_placement,
        )
        if args.teacher_adapter_name_or_path is not None:
            return with_adapter(load(), args.teacher_adapter_name_or_path, ours=True)
        return find_teacher(loading_of(args), teacher, load) or load()
    check_causal(teacher, "teacher")
    check_not_split(teacher, "teacher")
    if kwargs is not None:
        raise ValueError(
            f"teacher_model_init_kwargs={kwargs} has no effect: teacher_model is already a model; "
            "leave it out, or pass the teacher by name"
        )
    return with_adapter(teacher, args.teacher_adapter_name_or_path, ours=False)


def _check_same_base(student: Any, teacher: Any, args: GKDConfig) -> None:
    """Refuse a teacher beside the one that shares the student's base."""
    if teacher is not None and not isinstance(teacher, str):
        raise ValueError(
            "teacher_model is a model, and share_base_model=True says that the teacher is the student's own base: "
            "leave one of them out"
        )
    own = base_name(student) if isinstance(student, str) else model_name(student)
    named = teacher or args.teacher_model_name_or_path
    if named is not None and named != own:
        raise ValueError(
            f"share_base_model=True, but the teacher is {named!r} and the student's base {own!r}: leave "
            "teacher_model_name_or_path out, or share_base_model for a teacher with weights of its own"
        )


def resolve_tokenizer(tokenizer: Any, student: Any, args: GKDConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that renders the rows: the given one, or the student's own, loaded by its name; with a pad token
    and with `eos_token` and `chat_template_path` applied. Training, precomputing and the doctor all take it from here.

    Raises:
        ValueError: none is given and the student has no name; or what `apply_options` refuses.
    """
    if tokenizer is None:
        name = model_name(student)
        if name is None:
            raise ValueError("processing_class is missing and the student has no name to load it from: pass it")
        revision = args.model_init_kwargs.get("revision") if isinstance(args.model_init_kwargs, dict) else None
        tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code, revision=revision)
    return apply_options(check_tokenizer(tokenizer), args)


def tokenizer_of_teacher(teacher: Any, student: Any, args: GKDConfig) -> PreTrainedTokenizerBase | None:
    """The teacher's own tokenizer, by its name; None (with a warning where it matters) when it has none to compare."""
    name = model_name(teacher)
    if name is None or name == model_name(student):
        return None
    try:
        return load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    except ValueError as error:
        logger.warning("the teacher's token map cannot be compared with the student's: %s", error)
        return None


def loading_of(args: GKDConfig) -> Loading:
    """How the teacher is loaded when it is loaded by its name."""
    kwargs = args.teacher_model_init_kwargs or {}
    assert not isinstance(kwargs, str)  # TrainingArguments has parsed it
    return Loading(
        scores_dir=args.teacher_scores_dir,
        kwargs=kwargs,
        trust_remote_code=bool(args.trust_remote_code),
        mixed_precision=args.mixed_precision,
        placement=args.teacher_placement,
        adapted=args.teacher_adapter_name_or_path is not None or bool(args.teacher_adapters),
    )
