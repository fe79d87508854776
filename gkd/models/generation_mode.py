"""Put a model that is being trained into the state for generating, and back again exactly.

One context manager owns every change: unwrap DDP and DeepSpeed, gather ZeRO-3 shards, bring an offloaded teacher to
the accelerator, eval mode, gradient checkpointing off, an empty generation config, no auxiliary loss of a router. All
of it is undone when the body raises, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from gkd.models.eval_mode import evaluating
from gkd.models.placement import on_accelerator
from gkd.models.precision import mixed_precision
from gkd.models.zero import gathered, without_zero_hooks


@contextmanager
def generation_mode(model: nn.Module, accelerator: Accelerator | None) -> Iterator[PreTrainedModel]:
    """Yield the bare model, ready to generate under no_grad and the accelerator's autocast.

    Under ZeRO-3 every rank must enter, also one with nothing to generate: all parameters are gathered once, here, and
    not one collective runs inside, so ranks may generate different numbers of rows and tokens.

    Args:
        model: the model as the trainer holds it: bare, DDP, DeepSpeed engine; with or without a PEFT adapter.
        accelerator: its autocast is used; None runs without autocast.

    Yields:
        The `PreTrainedModel` inside, adapter layers included.

    Raises:
        ValueError: an adapter that changes the prompt rather than the weights (prompt tuning and its like).
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(on_accelerator(model))
        stack.enter_context(gathered(model.parameters()))
        stack.enter_context(without_zero_hooks(model))
        bare = _bare_model(model)
        stack.enter_context(evaluating(bare))
        stack.enter_context(_without_checkpointing(bare))
        stack.enter_context(_without_generation_config(bare))
        stack.enter_context(_without_router_logits(bare))
        stack.enter_context(mixed_precision(accelerator, model))
        yield bare


def _bare_model(model: nn.Module) -> PreTrainedModel:
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(bare, "peft_config"):
        for name, config in bare.peft_config.items():
            if getattr(config, "is_prompt_learning", False):
                raise ValueError(
                    f"the student's adapter {name!r} is of type {config.peft_type}, which rewrites the prompt: "
                    "rollouts need an adapter in the weights, such as LoRA"
                )
        if hasattr(bare, "get_base_model"):
            bare = bare.get_base_model()
    assert isinstance(bare, PreTrainedModel), f"cannot generate with a {type(bare).__name__}"
    return bare


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing off inside.

    Only the flags move: the checkpoint function with its kwargs stays where it is, so nothing can come back different.
    """
    flagged = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in flagged:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in flagged:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def _without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation config: `generate` fills every unset option from it (top_k=20, max_length, ...)."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """No auxiliary loss inside: with a KV cache it meets a mask that is longer than the tokens, and fails."""
    config = model.config.get_text_config()
    own = getattr(config, "output_router_logits", False)
    if own:
        config.output_router_logits = False
    try:
        yield
    finally:
        if own:
            config.output_router_logits = own
