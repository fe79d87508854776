"""A model's output head: found by its config, and compared with the model's own logits before it is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gkd.loss.signals import Head
from gkd.models.eval_mode import evaluating

# Where the architectures keep the factor of their logits: (config field, power it is raised to).
_SCALES = (("logit_scale", 1), ("output_multiplier", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1))
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_BLOCK = 2**14  # rows of a head that are converted at once to be compared
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)  # the others that have `logits_scaling` divide by it
_SCALE_BEFORE_THE_HEAD = ("minicpm3",)  # their hidden states are scaled already where the head sees them


def head_of(model: nn.Module) -> Head:
    """The output head of a causal language model from transformers, with or without PEFT adapters around it.

    The weight is the model's own parameter (no copy): its gradient reaches the model. Soft-capping and logit scale
    come from the text config; `check_head` verifies them against the model itself.

    Raises:
        ValueError: no output embeddings, a quantised head, a LoRA (or other adapter) layer on the head, a padded head
            that the model cuts.
    """
    base = _base(model)
    layer = _output_layer(base)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ValueError(
            f"the output head of {type(base).__name__} is quantised ({getattr(weight, 'dtype', type(weight))}): load "
            "the model with the head left in floating point (llm_int8_skip_modules=['lm_head'])"
        )
    config = _text_config(base)
    if getattr(config, "unpadded_vocab_size", None) not in (None, getattr(config, "vocab_size", None)):
        raise ValueError(
            f"{type(base).__name__} cuts its logits to unpadded_vocab_size={config.unpadded_vocab_size}, which is not "
            "supported: choose another model"
        )
    return Head(weight, bias, _logit_scale(config), _softcap(config))


def output_layer(model: nn.Module) -> nn.Module:
    """The module that holds the output head's weight: behind PEFT, and the trained copy where there is one.

    Raises:
        ValueError: see `head_of`.
    """
    layer: nn.Module = _output_layer(_base(model))
    return layer


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _output_layer(base: Any) -> Any:
    layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(
            f"{type(base).__name__} has no output embeddings: pass a causal language model (AutoModelForCausalLM)"
        )
    if hasattr(layer, "modules_to_save"):  # PEFT modules_to_save: the adapter's own full copy of the head is what runs
        active = layer.active_adapter if isinstance(layer.active_adapter, str) else layer.active_adapter[0]
        if getattr(layer, "disable_adapters", False) or active not in layer.modules_to_save:
            return layer.original_module
        return layer.modules_to_save[active]
    if hasattr(layer, "token_adapter"):
        raise ValueError(
            "trainable_token_indices with tied embeddings changes rows of the output head, which the loss would not "
            "see: take trainable_token_indices out, train both whole (modules_to_save=['embed_tokens'], "
            "ensure_weight_tying=True), or take a model whose head is its own"
        )
    if hasattr(layer, "base_layer"):
        raise ValueError(
            "an adapter sits on the output head (lm_head), which the loss would not see: take 'lm_head' out of the "
            "LoRA target_modules, or train the whole head with modules_to_save=['lm_head']"
        )
    if not hasattr(layer, "weight"):
        raise ValueError(f"the output head of {type(base).__name__} is a {type(layer).__name__} without a weight")
    return layer


def _text_config(base: Any) -> Any:
    return base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    if isinstance(value, str):
        raise ValueError(f"config.{name}={value!r} is not a number: this model's logit scale is not supported")
    return None if value is None else float(value)


def _logit_scale(config: Any) -> float:
    if str(getattr(config, "model_type", "")).startswith(_SCALE_BEFORE_THE_HEAD):
        return 1.0
    for name, power in _SCALES:
        value = _number(config, name)
        if value is not None:
            if str(getattr(config, "model_type", "")).startswith(_MULTIPLY_BY_LOGITS_SCALING):
                power = 1
            return value**power
    return 1.0


def _softcap(config: Any) -> float | None:
    for name in _SOFTCAPS:
        value = _number(config, name)
        if value is not None:
            return value
    return None


def check_head(model: nn.Module, head: Head, input_ids: Tensor | None = None) -> None:
    """Run the model on a few tokens and compare its logits with the head's: catches what no config field says.

    Call it in the precision that the model runs in (`gkd.models.precision.mixed_precision`): some kernels take no
    fp32.

    Args:
        model: the causal language model, whole (under ZeRO-3 `gkd.models.hidden.instead_of_logits` checks instead).
        head: what `head_of` gave.
        input_ids: [1, T] to run on. None = a few small ids.

    Raises:
        ValueError: the logits differ.
    """
    if input_ids is None:
        input_ids = torch.arange(1, min(5, head.weight.shape[0]), device=head.weight.device)[None]
    base = _base(model)
    with torch.no_grad(), evaluating(model), _head_input(base) as seen:
        logits = model(input_ids=input_ids, use_cache=False).logits
        compare_logits(base, head, logits, *exact_logits(head, seen[-1]))


@torch.no_grad()
def exact_logits(head: Head, hidden: Tensor) -> tuple[Tensor, torch.dtype]:
    """Logits of a few tokens, from what the model multiplies but in fp32 (fp64 for fp64), and the dtype it does so in.

    The head is converted a block at a time: as a whole it may be gigabytes.
    """
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    wide = torch.promote_types(compute, torch.float32)
    few = hidden.detach().to(compute).to(wide)
    blocks = []
    with torch.autocast(device, enabled=False):
        for start in range(0, head.weight.shape[0], _BLOCK):
            bias = None if head.bias is None else head.bias[start : start + _BLOCK].to(compute).to(wide)
            weight = head.weight[start : start + _BLOCK].to(compute).to(wide)
            blocks.append(Head(weight, bias, head.logit_scale, head.softcap).logits(few))
    return torch.cat(blocks, dim=-1), compute


def compare_logits(model: nn.Module, head: Head, logits: Tensor, exact: Tensor, compute: torch.dtype) -> None:
    """Whether a model's logits are `exact` ones up to the rounding of its dtype.

    A rounding is half an eps of a logit at most, and a few are made on the way. So none may be off by more than some
    eps of the largest, and all together, where roundings average out and a mistake does not, by one eps.

    Raises:
        ValueError: they are not.
    """
    eps, half = torch.finfo(compute).eps, compute in (torch.bfloat16, torch.float16)
    same = logits.shape == exact.shape
    if same:
        off = (logits.to(exact.dtype) - exact).abs()
        same = bool(off.max() <= (4 if half else 64) * eps * exact.abs().max().clamp_min(1))
        if half:
            same = same and bool(off.square().mean().sqrt() <= eps * exact.square().mean().sqrt())
    if not same:
        raise ValueError(
            f"{type(_base(model)).__name__} does something to its logits that gkd does not know (scale "
            f"{head.logit_scale}, softcap {head.softcap} give other logits than the model's own): this model is not "
            "supported"
        )


@contextmanager
def _head_input(base: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = _output_layer(base).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
