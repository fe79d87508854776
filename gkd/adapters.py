"""Adapters of frozen teachers: loading them, and a second model over weights that are there already.

One copy of a base model can hold several roles, because a model is two things: its weights and the modules that use
them. `second_model` makes the modules anew over the very same parameters, without the adapters of the first. So a
teacher that shares the student's base has its own train mode, dropout, hooks and adapter, and nothing that it does can
reach the student's; what they have in common does not change while the student trains an adapter.
"""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from gkd.random_state import preserved_random_state
from gkd.rounding import generator_for, stochastically_rounded

logger = logging.getLogger(__name__)

# Initialisations that take something out of the base's weights when the adapter is made.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def load_adapter(
    base: nn.Module, name: str, field: str, *, shared: bool = False, trained: bool = False, fp32: bool = True
) -> PeftModel:
    """An adapter on a model, whose modules PEFT changes in place; no random stream is moved.

    Args:
        base: a causal language model without adapters.
        name: folder, or name on the Hub, of a PEFT adapter in safetensors.
        field: what to name in an error.
        trained: it is to be trained on; else it is frozen.
        fp32: keep its weights in float32 where the base's are narrower.
        shared: the weights of `base` belong to others too, so the adapter must not change them.

    Raises:
        ValueError: there is no adapter, none in safetensors, it does not fit the model, or it changes what is shared.
    """
    folder = adapter_folder(name, field)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{field}={name!r}: its {CONFIG_NAME} cannot be read: {error}") from error
    if config.is_prompt_learning:
        raise ValueError(f"{field}={name!r} is {config.peft_type}, which changes the prompt: use a LoRA adapter")
    if shared:
        _check_leaves_base(config, f"{field}={name!r}")
    _warn_of_another_base(config, base, f"{field}={name!r}")
    config.inference_mode = not trained
    try:
        with preserved_random_state():  # an adapter is drawn at random before its weights are read
            model = PeftModelForCausalLM(base, config, autocast_adapter_dtype=fp32)
            options = {"is_trainable": trained, "autocast_adapter_dtype": fp32}
            result = model.load_adapter(str(folder), "default", torch_device="cpu", **options)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{field}={name!r} does not fit the model {_name(base)!r}: {' '.join(line.strip() for line in reason[:3])}"
        ) from error
    strange = [*result.missing_keys, *result.unexpected_keys]
    if strange:
        raise ValueError(
            f"{field}={name!r} does not fit the model {_name(base)!r}: {len(strange)} weights are missing or have no "
            f"place there, {strange[0]} for one. Name the base that it was trained on"
        )
    if not trained:
        model.requires_grad_(False)
    return model.eval()


def with_adapter(model: Any, name: str | None, *, ours: bool) -> Any:
    """A teacher with its adapter, `teacher_adapter_name_or_path`.

    Args:
        model: the teacher's model. name: its adapter, None for none.
        ours: nobody else holds the model, so that the adapter may be merged into its weights. Another's model stays as
            it is: the adapter goes on a second model over the same weights.

    Raises:
        ValueError: see `load_adapter`; or the model has an adapter already.
    """
    field = "teacher_adapter_name_or_path"
    if name is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{field}={name!r}: teacher_model has an adapter already; pass its base model, or leave it out"
        )
    if ours:
        return merged(load_adapter(model, name, field))
    return load_adapter(second_model(model), name, field, shared=True)


def merged(model: PeftModel) -> nn.Module:
    """The adapter's product added to the weights (Hu et al., arXiv 2106.09685, section 4.1), where that can be done.

    The sum is taken in fp32 and brought to the weights' dtype by stochastic rounding (`gkd.rounding`): the nearest
    bf16 number is the old weight wherever the update is small. The random numbers are the same in every run, so the
    teacher is. A weight that several modules share gets a copy for the module with the adapter. Weights that are
    quantized or split over ranks, adapters other than LoRA, and layers that PEFT cannot merge are left as they are.
    """
    split = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if split or getattr(model, "is_quantized", False) or model.active_peft_config.peft_type != "LORA":
        return model
    uses = parameter_uses(model)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    done = [_merge_layer(layer, uses) for layer in layers]  # every one that can be
    if not all(done):
        return model
    whole: Any = model.unload()
    head, embeddings = whole.get_output_embeddings(), whole.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        whole.config.get_text_config().tie_word_embeddings = False
    whole.requires_grad_(False)
    return whole.eval()


def _merge_layer(layer: Any, uses: dict[int, int]) -> bool:
    """Whether it could be done."""
    base = layer.get_base_layer()
    for name, parameter in list(base.named_parameters(recurse=False)):
        if uses.get(id(parameter), 1) > 1:
            setattr(base, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    for parameter in layer.parameters():  # PEFT computes in the dtype that it finds
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    try:
        layer.merge(safe_merge=True)
    except NotImplementedError:  # a convolution in groups, an adapter that acts on some tokens only
        done = False
    else:
        done = True
    for name, parameter in base.named_parameters():  # what was not changed stands on its grid, and stays
        generator = generator_for(0, 0, parameter.device)
        parameter.data = stochastically_rounded(parameter.data, dtypes[name], generator)
    return done


def parameter_uses(model: nn.Module) -> dict[int, int]:
    """In how many modules each parameter (by its id) stands: more than once where weights are tied."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def adapter_folder(name: str, field: str) -> Path:
    """The folder of an adapter with both files; from the Hub they come from one revision.

    Raises:
        ValueError: one of them is missing, or the weights are a pickle.
    """
    if os.path.isdir(name):
        missing = [file for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (Path(name) / file).is_file()]
        if not missing:
            return Path(name)
        hint = ""
        if (Path(name) / "config.json").is_file() and CONFIG_NAME in missing:
            hint = ": it is a whole model, name it as teacher_model_name_or_path"
        elif any(Path(name).glob("adapter_model.bin")):
            hint = ": a pickle may run any program when it is loaded, so save the adapter as safetensors"
        raise ValueError(f"{field}={name!r} has no {' and no '.join(missing)}{hint}")
    try:
        files = [hf_hub_download(name, file) for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{field}={name!r} is neither a folder nor an adapter in safetensors on the Hub: {reason}"
        ) from error
    return Path(files[0]).parent


def _check_leaves_base(config: Any, what: str) -> None:
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ValueError(
            f"{what} was trained with bias={bias!r}, which changes the base's own biases, and these are shared: give "
            "that teacher weights of its own (teacher_adapter_name_or_path without share_base_model)"
        )
    _check_initialisation(config, what)


def _check_initialisation(config: Any, what: str) -> None:
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"{what} has init_lora_weights={start!r}, which takes something out of the base's weights, so they are no "
            "longer the teacher's: use another initialisation, or give the teacher weights of its own "
            "(share_base_model=False)"
        )


def _warn_of_another_base(config: Any, base: nn.Module, what: str) -> None:
    own, here = config.base_model_name_or_path, _name(base)
    if own and here and own.rstrip("/").split("/")[-1] != here.rstrip("/").split("/")[-1]:
        logger.warning("%s was trained on %s, and is now put on %s: is that the same model?", what, own, here)


def _name(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


# ------------------------------------------------------------------------------------------------- shared weights


def check_shareable(student: nn.Module) -> None:
    """Refuse a student whose training changes the weights that its teacher would share.

    Raises:
        ValueError: it has no adapter, or the adapter's training or making changes the base.
    """
    if not isinstance(student, PeftModel):
        raise ValueError(
            "share_base_model=True needs a student with an adapter: full fine-tuning changes the weights that the "
            "teacher shares. Pass a peft_config (--use_peft), or leave share_base_model out and name the teacher"
        )
    for name, config in student.peft_config.items():
        _check_initialisation(config, f"share_base_model=True: the student's adapter {name!r}")
    if any(layer.merged for layer in student.modules() if isinstance(layer, BaseTunerLayer)):
        raise ValueError(
            "share_base_model=True: the student's adapter is merged into the base: call unmerge_adapter()"
        )


def second_model(model: Any) -> Any:
    """Another model over the same parameters, without the adapters of the first; in eval mode, its buffers its own.

    Raises:
        ValueError: a `device_map` has spread the parameters over several devices.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    devices = set((getattr(base, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"device_map has spread the weights over {len(devices)} devices, and weights that several models share "
            "(share_base_model, teacher_adapters, an adapter on a teacher_model) must stand on one: leave it out"
        )
    same: dict[int, Any] = {id(parameter): parameter for parameter in base.parameters()}
    for module in base.modules():
        same |= {id(thing): thing for thing in _packed(module)}
    twin = copy.deepcopy(base, same)
    _drop_adapters(twin)
    for module in twin.modules():
        vars(module).pop("forward", None)  # a replacement that may be bound to the first model
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    vars(twin).pop("peft_config", None)
    return twin.eval()


def _packed(module: Any) -> list[Any]:
    """What a layer of bitsandbytes holds of its weight outside the parameter: scales, and int8 values after a run."""
    scales, state = getattr(module, "quant_state", None), getattr(module, "state", None)
    held = vars(state).values() if hasattr(state, "__dict__") else ()
    return ([] if scales is None else [scales]) + [thing for thing in held if isinstance(thing, Tensor)]


def base_of_student(student: nn.Module) -> Any:
    """A second model over the base's weights of a student that trains an adapter.

    Raises:
        ValueError: the student's training changes them.
    """
    check_shareable(student)
    twin = second_model(student)
    trained = [name for name, parameter in twin.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"share_base_model=True, but the student trains {len(trained)} parameters of the base itself, "
            f"{trained[0]} for one: use an adapter with bias='none'"
        )
    return twin


def is_new(student: nn.Module) -> bool:
    """Whether a LoRA adapter still does nothing: B is 0 as it was made."""
    ups = [
        parameter for name, parameter in student.named_parameters() if "lora_B" in name or "lora_embedding_B" in name
    ]
    return bool(ups) and not any(bool(parameter.any()) for parameter in ups)


def _drop_adapters(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        inner = child
        while True:
            if isinstance(inner, AuxiliaryTrainingWrapper):  # modules_to_save, trainable_token_indices
                inner = inner.original_module
            elif isinstance(inner, BaseTunerLayer):
                inner = inner.get_base_layer()
            else:
                break
        if inner is not child:
            setattr(module, name, inner)
        _drop_adapters(inner)
