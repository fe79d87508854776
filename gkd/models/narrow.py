"""A smaller model out of a large one: inner neurons of its MLPs left out, those that add least to the hidden state.

An MLP adds sum over j of a_j w_j to the hidden state: a_j is what its last projection reads from neuron j (of a gated
MLP the gate's activation times the other branch), w_j that projection's column. Without neuron j alone a token's
hidden state misses a_j w_j, so a neuron counts by the root of the mean of its square over tokens: |w_j| rms(a_j).
Minitron (Muralidharan et al., arXiv 2407.14679, section 2.2) takes activations alone, those of the first projection;
the norm of weights beside that of their input is the score of Wanda (Sun et al., arXiv 2306.11695), here for a column
in the place of a weight. Every layer keeps as many, the best of its own.

Which tensors have an inner dimension is not read off names: it is asked by building the model with another width and
comparing shapes. What comes out is compared with the large model whose neurons are silenced.

T tokens, W inner neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gkd.models.shrink import layers_of, rebuilt

# Where configs have the width.
_FIELDS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "dim_ff")


@dataclass(frozen=True)
class Inner:
    """The inner neurons of a model's MLPs.

    Attributes:
        field: the config's name of the width. width: W, of every layer. downs: by layer, what reads the neurons.
        sides: by a tensor's name, its dimension that goes by neurons, and how often (twice: gate and other branch).
    """

    field: str
    width: int
    downs: list[nn.Module]
    sides: Mapping[str, tuple[int, int]]


def inner_of(model: Any) -> Inner:
    """Find them.

    Raises:
        ValueError: the layers do not have one dense MLP each, all of one width that the config names.
    """
    name, layers = layers_of(model)
    of_text = model.config.get_text_config()
    for field in (field for field in _FIELDS if hasattr(of_text, field)):
        found = _sides(model, field)
        downs = [module for key, module in model.named_modules() if _reads(module, found.get(f"{key}.weight"))]
        placed = [sum(module is down for module in layer.modules() for down in downs) for layer in layers]
        widths = {model.state_dict()[key].shape[side] // times for key, (side, times) in found.items()}
        if placed == [1] * len(layers) and len(widths) == 1 and all(key.startswith(f"{name}.") for key in found):
            return Inner(field, widths.pop(), downs, found)
    raise ValueError(
        f"{type(model).__name__} has no dense MLP in every layer whose width its config names (a mixture of experts, "
        "or layers of several widths): leave --width out and shrink it with --layers"
    )


def _sides(model: Any, field: str) -> dict[str, tuple[int, int]]:
    """By name, the tensors that another width makes larger or smaller: in which dimension, and by how many widths."""
    other = copy.deepcopy(model.config)
    probe = 8 if getattr(other.get_text_config(), field) != 8 else 16
    setattr(other.get_text_config(), field, probe)
    try:
        with torch.device("meta"):
            shapes = {key: tensor.shape for key, tensor in type(model)(other).state_dict().items()}
    except (ValueError, TypeError, RuntimeError):  # a config that knows it as something else than a number
        return {}
    found = {}
    for key, tensor in model.state_dict().items():
        if key not in shapes or len(shapes[key]) != tensor.dim():
            return {}
        changed = [side for side in range(tensor.dim()) if shapes[key][side] != tensor.shape[side]]
        if changed:
            times, rest = divmod(shapes[key][changed[0]], probe)
            if len(changed) > 1 or tensor.dim() > 2 or rest or times not in (1, 2) or tensor.shape[changed[0]] % times:
                return {}
            found[key] = changed[0], times
    return found


def _reads(module: nn.Module, side: tuple[int, int] | None) -> bool:
    """Whether it is a projection from the inner neurons."""
    if isinstance(module, nn.Linear):
        return side == (1, 1)
    return isinstance(module, Conv1D) and side == (0, 1)


@torch.no_grad()
def what_neurons_add(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """By layer, [W] in float64: how much each neuron adds to the hidden state, the root mean square over tokens.

    Args:
        model: in eval mode. rows: token ids.
    """
    inner = inner_of(model)
    squares = [torch.zeros(inner.width, dtype=torch.float64) for _ in inner.downs]

    def read(down: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares[inner.downs.index(down)] += args[0].reshape(-1, inner.width).double().pow(2).sum(0).cpu()

    with _before(inner.downs, read):
        for row in rows:
            model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
    tokens = max(sum(map(len, rows)), 1)
    return [(sums / tokens).sqrt() * _columns(down).cpu() for sums, down in zip(squares, inner.downs, strict=True)]


def _columns(down: nn.Module) -> Tensor:
    """[W]: the norm of what is added for each neuron."""
    weight: Any = down.weight
    return torch.linalg.vector_norm(weight.double(), dim=0 if isinstance(down, nn.Linear) else 1)


@contextmanager
def _before(modules: Sequence[nn.Module], do: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(do) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adding_most(model: Any, rows: Sequence[Sequence[int]], keep: int) -> list[Tensor]:
    """By layer, the numbers of the neurons to keep, in their order."""
    return [scores.topk(keep).indices.sort().values for scores in what_neurons_add(model, rows)]


def with_neurons(model: Any, kept: Sequence[Tensor]) -> Any:
    """A model of the same class whose MLPs have only these neurons, as many in every layer; weights are copied.

    Raises:
        ValueError: the MLPs do more with their neurons than to read each by itself (a norm over them, for example).
    """
    inner = inner_of(model)
    name, _ = layers_of(model)
    config = copy.deepcopy(model.config)
    setattr(config.get_text_config(), inner.field, len(kept[0]))
    state = model.state_dict()
    for key, (side, times) in inner.sides.items():
        numbers = kept[int(key.removeprefix(f"{name}.").partition(".")[0])]
        numbers = torch.cat([numbers + inner.width * i for i in range(times)]).to(state[key].device)
        state[key] = state[key].index_select(side, numbers)
    smaller = rebuilt(model, config, state)
    _check_silenced(model, inner, kept, smaller)
    return smaller


@torch.no_grad()
def _check_silenced(model: Any, inner: Inner, kept: Sequence[Tensor], smaller: Any) -> None:
    """The large model with the other neurons at 0 says what the small one says."""
    stay = [torch.zeros(inner.width).index_fill(0, numbers, 1.0) for numbers in kept]

    def silence(down: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0] * stay[inner.downs.index(down)].to(args[0]),)

    ids = torch.arange(min(16, model.config.get_text_config().vocab_size), device=model.device)[None]
    with _before(inner.downs, silence):
        wanted = model(input_ids=ids, use_cache=False).logits.double()
    found = smaller(input_ids=ids, use_cache=False).logits.double()
    off = float((found - wanted).norm() / wanted.norm())
    # sums in another order, once a layer
    if not off < 1e-3 + 16 * torch.finfo(model.dtype).eps:
        raise ValueError(
            f"{type(model).__name__}: without inner neurons its MLPs say something else than with the same neurons "
            f"silenced (logits differ by {off:.0%}): leave --width out and shrink it with --layers"
        )
