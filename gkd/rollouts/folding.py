"""Fold a LoRA adapter into the weights for the time of a rollout.

An unmerged adapter costs two thin matrix products and a few small ones per layer and token. Folding costs one product
per layer and rollout: `W' = W + s B A` (Hu et al., arXiv 2106.09685, section 4.1) goes into new memory and the old
memory is put back afterwards, so the base weights come back bit for bit in every dtype, because nothing touched them.
PEFT's own unmerging subtracts, which leaves rounding errors.

The sum is taken in fp32 and then brought to the dtype that the matrix products run in (the autocast dtype, else the
weights'). In fp32 the folded model is the same up to rounding. bf16 has 8 bits, and a weight of a checkpoint that was
saved in bf16 stands exactly on its grid: rounded to the nearest, most of the update would be lost, and the model that
writes would be half way back to the base (docs/rollouts.md has the figures). So the rounding is stochastic, with
random numbers of (seed, step): every rank folds alike, and the error is far below that of computing in bf16 at all.

Under autocast the frozen weights of the other linear layers are brought to its dtype once, too: autocast does not
remember what it has cast for frozen weights, and would cast them again for every token.

The price is memory: a second copy of the linear layers' weights, in the dtype of the products, while the rollout runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gkd.models.adapters import parameter_uses
from gkd.models.rounding import generator_for, stochastically_rounded

_COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def foldable(model: nn.Module) -> list[lora.Linear]:
    """The plain LoRA layers of a model. Variants, quantized, shared and already merged weights stay as they are."""
    uses = parameter_uses(model)
    return [module for module in model.modules() if _is_foldable(module, uses)]


def castable(model: nn.Module) -> list[nn.Module]:
    """The frozen plain linear layers without an adapter, whose weights autocast would cast for every token."""
    uses = parameter_uses(model)
    layers = {
        id(inner) for module in model.modules() if isinstance(module, lora.LoraLayer) for inner in module.modules()
    }
    return [module for module in model.modules() if id(module) not in layers and _is_castable(module, uses)]


def _is_foldable(layer: Any, uses: dict[int, int]) -> bool:
    # Exactly this class: quantized layers are of their own classes.
    if type(layer) is not lora.Linear or layer.merged or layer.disable_adapters:
        return False
    names = _active(layer)
    plain = not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in names)
    weight = layer.get_base_layer().weight
    return bool(names) and plain and weight.dtype in _COMPUTE_DTYPES and uses[id(weight)] == 1


def _is_castable(layer: Any, uses: dict[int, int]) -> bool:
    if type(layer) not in (nn.Linear, Conv1D):
        return False
    weight = layer.weight
    return weight.dtype == torch.float32 and not weight.requires_grad and uses[id(weight)] == 1


@contextmanager
def folded(
    layers: list[lora.Linear], seed: int = 0, step: int = 0, others: list[nn.Module] | None = None
) -> Iterator[None]:
    """Fold these layers inside; the base weights are back, bit for bit, on leaving and when the body raises.

    Args:
        layers: what `foldable` gave.
        seed, step: the key of the random numbers for the rounding.
        others: what `castable` gave; their weights are in autocast's dtype inside.
    """
    originals: list[tuple[Tensor, Tensor]] = []
    generators: dict[torch.device, torch.Generator] = {}
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            if weight.device not in generators:
                generators[weight.device] = generator_for(seed, step, weight.device)
            originals.append((weight, weight.data))
            weight.data = _folded_weight(layer, generators[weight.device])
            layer.merged_adapters.extend(_active(layer))
        for module in others or []:
            other: Any = module.weight
            originals.append((other, other.data))
            other.data = other.data.to(_product_dtype(other))
        yield
    finally:
        for weight, original in originals:
            weight.data = original
        for layer in layers:
            layer.merged_adapters.clear()


def _active(layer: lora.Linear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies: autocast's, which leaves fp64 alone, or the weight's own."""
    device = weight.device.type
    autocast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else weight.dtype


def _folded_weight(layer: lora.Linear, generator: torch.Generator) -> Tensor:
    parameter = layer.get_base_layer().weight
    weight, compute = parameter.data, _product_dtype(parameter)
    # From the weight as the student's own products see it: what rounding does to it is then the same in both.
    total = weight.to(compute).to(torch.promote_types(compute, torch.float32))
    if total.data_ptr() == weight.data_ptr():
        total = total.clone()
    with torch.autocast(weight.device.type, enabled=False):  # which would take the sum in its own dtype
        for name in _active(layer):
            down, up = (part[name].weight.data.to(total.dtype) for part in (layer.lora_A, layer.lora_B))
            if layer.fan_in_fan_out:
                total.addmm_(down.t(), up.t(), alpha=layer.scaling[name])
            else:
                total.addmm_(up, down, alpha=layer.scaling[name])
    result = stochastically_rounded(total, compute, generator)
    # A trained weight keeps its dtype: its gradient's node belongs to it. The values are on the grid all the same.
    return result.to(weight.dtype) if parameter.requires_grad else result
