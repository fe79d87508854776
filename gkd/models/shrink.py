"""A smaller model out of a large one: some of its layers left out, those that change the hidden state least.

How much a layer, or a run of n layers, changes the hidden state is 1 - cos of what goes in and what comes out, mean
over tokens: of single layers this is the block influence of ShortGPT (Men et al., arXiv 2403.03853), of runs what
Gromov et al. (arXiv 2403.17887) compare, who take the angle. A run that changes little as a whole can be left out as a
whole. The last layer stays, as they advise: what it makes is what the output head was trained to read.

T tokens, D hidden size, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gkd.models.facts import model_name


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The model's layers, and their name in it.

    Raises:
        ValueError: they are not one list of so many modules as the config says.
    """
    number = int(model.config.get_text_config().num_hidden_layers)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = [
        (name, module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)
        and len(module) == number
    ]  # fmt: skip
    if not found:
        raise ValueError(
            f"{model_name(model)!r} ({type(model).__name__}) has no list of {number} layers to choose from"
        )
    layers = found[0][1]
    return next(name for name, module in model.named_modules() if module is layers), layers


@torch.no_grad()
def changes(model: Any, rows: Sequence[Sequence[int]], run: int = 1) -> list[float]:
    """How much each run of `run` layers changes the hidden state: L - run + 1 numbers, by its first layer.

    Args:
        model: in eval mode. rows: token ids.
    """
    _, layers = layers_of(model)
    number = len(layers) - run + 1
    sums, count = torch.zeros(number, dtype=torch.float64), 0
    states: list[Tensor] = []
    with _watched(layers, states):
        for row in rows:
            states.clear()
            model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
            for first in range(number):
                alike = nn.functional.cosine_similarity(states[first].float(), states[first + run].float(), dim=-1)
                sums[first] += (1 - alike).double().sum().cpu()
            count += len(row)
    return (sums / max(count, 1)).tolist()


@contextmanager
def _watched(layers: nn.ModuleList, states: list[Tensor]) -> Iterator[None]:
    """Inside, `states` gets what goes into each layer, then what comes out of the last: L + 1 times [T, D]."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[0])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def least_changing(model: Any, rows: Sequence[Sequence[int]], keep: int, *, in_one: bool = True) -> tuple[int, ...]:
    """The numbers of the layers to keep.

    Args:
        in_one: leave out one run of neighbours; else the layers that change least by themselves.
    """
    number = len(layers_of(model)[1])
    out = number - keep
    if out == 0:
        return tuple(range(number))
    if in_one:
        found = changes(model, rows, out)
        first = found.index(min(found[:-1] or found))
        left = set(range(first, first + out))
    else:
        single = changes(model, rows)
        left = set(sorted(range(number - 1), key=lambda layer: single[layer])[:out])
    return tuple(layer for layer in range(number) if layer not in left)


def with_layers(model: Any, kept: Sequence[int]) -> Any:
    """A model of the same class that has only these layers, numbered anew, with copies of the weights.

    Raises:
        ValueError: the architecture's layers cannot be numbered anew.
    """
    name, layers = layers_of(model)
    config = copy.deepcopy(model.config)
    of_text, number = config.get_text_config(), len(layers)
    for key, value in list(of_text.to_dict().items()):
        if isinstance(value, list) and len(value) == number:  # one entry a layer: which attention, which kind
            setattr(of_text, key, [value[layer] for layer in kept])
    of_text.num_hidden_layers = len(kept)
    new_number = {str(old): str(new) for new, old in enumerate(kept)}
    state = {}
    for key, tensor in model.state_dict().items():
        rest = key.removeprefix(f"{name}.")
        layer, _, tail = rest.partition(".")
        if not key.startswith(f"{name}."):
            state[key] = tensor
        elif layer in new_number:
            state[f"{name}.{new_number[layer]}.{tail}"] = tensor
    return rebuilt(model, config, state)


def rebuilt(model: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    """A model of the same class by another config with these weights, in eval mode.

    Raises:
        ValueError: the weights are not those of such a model.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)  # `to` would round what stays in float32, such as the rotary frequencies
    try:
        smaller = type(model)(config)
    finally:
        torch.set_default_dtype(usual)
    try:
        smaller.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(model).__name__} cannot be built with other sizes: {reason}") from error
    smaller.tie_weights()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval()
