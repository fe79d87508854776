"""Run a causal language model for its last hidden states only: no logits for any position are ever built.

The whole wrapped model runs (DDP, DeepSpeed, autocast, gradient checkpointing: all hooks fire as usual). A hook in
front of the output head keeps what the head was about to project and hands it an empty slice instead, so the head
costs nothing and whatever the model does to its logits afterwards (soft-capping, scaling) is done to an empty tensor.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def last_hidden(wrapped: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The hidden states that `head` would project.

    Args:
        wrapped: the model as the trainer calls it.
        head: the output embeddings inside it (`get_output_embeddings()`).
        inputs: keyword arguments of the forward pass; `input_ids` [B, T].

    Returns:
        Hidden states [B, T, D] in the model's compute dtype, and the model's outputs (logits are empty).

    Raises:
        ValueError: the model did not pass all T positions through its head (prompt-learning PEFT adds virtual tokens).
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        outputs = wrapped(**inputs, use_cache=False)
    finally:
        handle.remove()
    assert len(kept) == 1, f"the output head ran {len(kept)} times in one forward pass"
    hidden = kept[0]
    if hidden.shape[:2] != inputs["input_ids"].shape:
        raise ValueError(
            f"the model's head saw hidden states {tuple(hidden.shape[:2])} for input_ids "
            f"{tuple(inputs['input_ids'].shape)}: prompt-learning adapters are not supported, use LoRA"
        )
    return hidden, outputs
