"""Run a causal language model up to its output head and do something else there: no logits are ever built.

The whole wrapped model runs (DDP, DeepSpeed, autocast, gradient checkpointing: all hooks fire as usual). Only the
head's own `forward` is replaced, inside its hooks: ZeRO-3 has gathered the head's weight when ours runs, gathers it
again for our backward pass, and sees one module with an input and an output like any other. Behind the head the model
goes on with an empty tensor, so whatever it does to logits (soft-capping, scaling) costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gkd.loss.signals import Head
from gkd.models.head import compare_logits, exact_logits

_POSITIONS = 4  # whose logits are compared, where they are


def instead_of_logits(
    wrapped: nn.Module,
    head: nn.Module,
    inputs: dict[str, Any],
    use: Callable[[Tensor], Tensor],
    check: Head | None = None,
) -> tuple[Tensor, Any]:
    """Call `use` on the hidden states that `head` would project.

    Args:
        wrapped: the model as the trainer calls it.
        head: the module inside it that holds the head's weight (`gkd.models.head.output_layer`).
        inputs: keyword arguments of the forward pass; `input_ids` [B, T].
        use: hidden states [B, T, D] in the model's compute dtype -> a tensor, say the loss.
        check: what `head_of` gave: compare the model's logits of a few positions with it, as `check_head` does for
            models that can be run outside their engine.

    Returns:
        What `use` gave, and the model's outputs (logits are empty, or those of the positions that were checked).

    Raises:
        ValueError: the model did not pass all T positions through its head (prompt-learning PEFT adds virtual tokens),
            or does something to its logits that `check` does not know.
    """
    results: list[Tensor] = []
    checked: list[tuple[Tensor, Tensor, torch.dtype]] = []
    own = vars(head).get("forward")  # accelerate and others may have replaced it, too

    # Traced by torch.compile, both would be taken to pieces, and compiled anew in every step.
    @torch._dynamo.disable
    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != inputs["input_ids"].shape:
            raise ValueError(
                f"the model's head saw hidden states {tuple(hidden.shape[:2])} for input_ids "
                f"{tuple(inputs['input_ids'].shape)}: prompt-learning adapters are not supported, use LoRA"
            )
        if check is not None:
            few = hidden[:1, :_POSITIONS].detach()
            with torch.no_grad():
                raw = type(head).forward(head, few) if own is None else own(few)
            checked.append((raw, *exact_logits(check, few)))
        return use(hidden)

    @torch._dynamo.disable
    def keep(_module: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
        results.append(result)  # behind all other hooks of the head, which may have put their own node on it
        # Empty, but with the graph behind it: DDP looks for the parameters in use from the model's outputs.
        empty = result.reshape(-1)[:0]
        if checked:
            raw = checked[0][0]
            return torch.cat([raw.flatten(), empty.to(raw.dtype)]).view(raw.shape)
        return empty.view(args[0].shape[0], 0, 1)

    with _replaced(head, forward, keep):
        outputs = wrapped(**inputs, use_cache=False)
    assert len(results) == 1, f"the output head ran {len(results)} times in one forward pass"
    if check is not None:
        _, exact, compute = checked[0]
        compare_logits(getattr(wrapped, "module", wrapped), check, outputs.logits.detach(), exact, compute)
    return results[0], outputs


@contextmanager
def _replaced(head: nn.Module, forward: Callable[[Tensor], Tensor], hook: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, `head` runs `forward`, and `hook` behind all of its other hooks."""
    own = vars(head).get("forward")
    handle = head.register_forward_hook(hook)
    head.forward = forward
    try:
        yield
    finally:
        handle.remove()
        del head.forward
        if own is not None:
            head.forward = own


def last_hidden(
    wrapped: nn.Module, head: nn.Module, inputs: dict[str, Any], check: Head | None = None
) -> tuple[Tensor, Any]:
    """The hidden states [B, T, D] that `head` would project, and the model's outputs; see `instead_of_logits`."""
    return instead_of_logits(wrapped, head, inputs, lambda hidden: hidden, check)
