"""What is checked or switched off before the first step, so that nothing is silently wrong later."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel, PromptLearningConfig
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from gkd.absent_teacher import find_teacher
from gkd.adapters import with_adapter
from gkd.config import GKDConfig
from gkd.distributed import zero_stage
from gkd.loading import load_teacher, load_tokenizer, model_name, safe_weights
from gkd.placement import check_placement
from gkd.vocab import compare_chat_templates, compare_stop_ids

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
        args = GKDConfig(output_dir=f"{str(name).rstrip('/').split('/')[-1] or 'model'}-GKD")
    if not isinstance(args, GKDConfig):
        kind = "a plain TrainingArguments" if isinstance(args, TrainingArguments) else "no training arguments at all"
        raise TypeError(f"args is {type(args).__name__}, {kind}: pass a gkd.GKDConfig")
    if isinstance(model, str):
        assert not isinstance(args.model_init_kwargs, str)  # TrainingArguments has parsed it
        args.model_init_kwargs = safe_weights(model, args.model_init_kwargs, "model_init_kwargs")
    return args


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


def check_launch(args: GKDConfig) -> None:
    """Refuse launchers that this trainer cannot work under.

    Raises:
        ValueError: FSDP.
    """
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "FSDP is not supported: the output heads and the rollouts need whole weights; use DDP "
            "(deepspeed_configs/ddp.yaml) or, for models that do not fit, ZeRO-3 (deepspeed_configs/zero3.yaml)"
        )


def check_wiring(accelerator: Accelerator) -> None:
    """Refuse launches that came out as something else than was asked for, which would train all the same.

    Raises:
        ValueError: processes that do not know of each other, DeepSpeed left out, ZeRO-3 that cannot save a model.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if int(started) != accelerator.num_processes:
        raise ValueError(
            f"the launcher started WORLD_SIZE={started} processes, but accelerate joined {accelerator.num_processes}: "
            "each would train alone. On CPUs pass --use_cpu; otherwise see that every process sees its accelerator"
        )
    wanted = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if wanted and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError(
            f"the launcher asks for DeepSpeed, but accelerate runs {accelerator.distributed_type.value}: take "
            f"ACCELERATE_USE_CPU={os.environ.get('ACCELERATE_USE_CPU')} out of the environment, pass --use_cpu instead"
        )
    if zero_stage(accelerator) == 3:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "ZeRO-3 without stage3_gather_16bit_weights_on_model_save saves no weights: set it to true in the "
                "DeepSpeed config (zero3_save_16bit_model: true in an accelerate config file)"
            )


def check_not_quantized(model: Any, role: str, accelerator: Accelerator) -> None:
    """Refuse quantized weights under ZeRO-3, which would split up packed bytes.

    Raises:
        ValueError: they are.
    """
    if zero_stage(accelerator) == 3 and getattr(model, "is_quantized", False):
        raise ValueError(
            f"the {role} is quantized, which ZeRO-3 cannot split up: load it in bfloat16, or use DDP or ZeRO-2"
        )


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


def resolve_teacher(student: Any, teacher: Any, args: GKDConfig) -> Any:
    """The teacher as a model; loads it by name, unless its scores are known to be on disk (`AbsentTeacher`). None when
    it is on a server or shares the student's base.

    Raises:
        ValueError: there is no teacher, it is the student itself, or its loading arguments would have no effect.
    """
    if args.teacher_server_url is not None:
        if teacher is not None:
            raise ValueError("teacher_model does not go with args.teacher_server_url: one of them is the teacher")
        return None
    if args.share_base_model:
        _check_same_base(student, teacher, args)
        return None
    if student is teacher:
        raise ValueError(
            "model and teacher_model are the same object: freezing the teacher would freeze the student; "
            "pass a copy (copy.deepcopy) or the teacher's name"
        )
    if teacher is None:
        teacher = args.teacher_model_name_or_path
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
        return find_teacher(args, teacher, load) or load()
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
    own, named = model_name(student), teacher or args.teacher_model_name_or_path
    if named is not None and named != own:
        raise ValueError(
            f"share_base_model=True, but the teacher is {named!r} and the student's base {own!r}: leave "
            "teacher_model_name_or_path out, or share_base_model for a teacher with weights of its own"
        )


def resolve_tokenizer(tokenizer: Any, student: Any, args: GKDConfig) -> PreTrainedTokenizerBase:
    """The given tokenizer, or the student's own, loaded by its name; with a pad token.

    Raises:
        ValueError: none is given and the student has no name.
    """
    if tokenizer is None:
        name = model_name(student)
        if name is None:
            raise ValueError("processing_class is missing and the student has no name to load it from: pass it")
        tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    return check_tokenizer(tokenizer)


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


def warn_of_differences(
    stop_ids: dict[str, tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Warn when the teacher stops elsewhere than the student, or knows chats in another form: both make on-policy
    training drift, and neither shows in the loss."""
    remarks = [compare_stop_ids(stop_ids["student"], stop_ids["teacher"], tokenizer)]
    if teacher_tokenizer is not None:
        remarks.append(compare_chat_templates(tokenizer, teacher_tokenizer))
    for remark in remarks:
        if remark:
            logger.warning("%s", remark)
