"""Adapters of frozen teachers: loaded, checked against their base, and merged into it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from gkd.common.random_state import preserved_random_state
from gkd.models.facts import model_name
from gkd.models.rounding import generator_for, stochastically_rounded
from gkd.models.shared_weights import _check_initialisation, second_model
from gkd.models.zero import is_sharded

logger = logging.getLogger(__name__)


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
    does_not_fit = f"{field}={name!r} does not fit the model {model_name(base)!r}"
    try:
        with preserved_random_state():  # an adapter is drawn at random before its weights are read
            model = PeftModelForCausalLM(base, config, autocast_adapter_dtype=fp32)
            options = {"is_trainable": trained, "autocast_adapter_dtype": fp32}
            result = model.load_adapter(str(folder), "default", torch_device="cpu", **options)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
        raise ValueError(f"{does_not_fit}: {reason}") from error
    strange = [*result.missing_keys, *result.unexpected_keys]
    if strange:
        raise ValueError(
            f"{does_not_fit}: {len(strange)} weights are missing or have no place there, {strange[0]} for one. Name "
            "the base that it was trained on"
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

    The sum is taken in fp32 and brought to the weights' dtype by stochastic rounding (`gkd.models.rounding`): the
    nearest bf16 number is the old weight wherever the update is small. The random numbers are the same in every run,
    so the teacher is. A weight that several modules share gets a copy for the module with the adapter. Weights that
    are quantized or split over ranks, adapters other than LoRA, and layers that PEFT cannot merge are left as they
    are.
    """
    if is_sharded(model) or getattr(model, "is_quantized", False) or model.active_peft_config.peft_type != "LORA":
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


def _warn_of_another_base(config: Any, base: nn.Module, what: str) -> None:
    own, here = config.base_model_name_or_path, model_name(base)
    if own and here and own.rstrip("/").split("/")[-1] != here.rstrip("/").split("/")[-1]:
        logger.warning("%s was trained on %s, and is now put on %s: is that the same model?", what, own, here)
