"""A model's fingerprint: a hash of its weights and config, under which what it says is kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gkd.common.keyed_folder import digest
from gkd.models.zero import gathered

_SAMPLES = 256  # words of a parameter that are hashed with their place


def fingerprint(model: nn.Module, *, frozen_only: bool = False) -> str:
    """32 hexadecimal digits of a model's config and weights; the name and the folder it came from do not matter.

    `frozen_only`: of the weights that are not trained, and nothing else.

    Of every parameter: name, shape, dtype, the sum of all its bytes as 64-bit words (so one changed weight shows), and
    256 words spread over it (so an exchange shows). Read at memory speed. Of an adapter also how strongly it acts.
    Sharded parameters (ZeRO-3) are gathered one at a time: all ranks call this, and all get the result that an
    unsharded model gives.

    Raises:
        ValueError: weights that are not in memory (offloaded to disk).
    """
    state = hashlib.blake2b(digest_size=16)
    state.update(digest(None if frozen_only else _config(model)).encode())
    for place, module in () if frozen_only else model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict):
            state.update(json.dumps([place, module.scaling]).encode())
    for name, parameter in model.named_parameters():
        if frozen_only and parameter.requires_grad:
            continue
        with gathered([parameter]), torch.no_grad():
            if parameter.device.type == "meta":
                raise ValueError(
                    f"the teacher's {name} is offloaded, so a change of it would go unseen: set teacher_cache_dir="
                    "'off', or keep the teacher in memory"
                )
            about = [name, list(parameter.shape), str(parameter.dtype)]
            state.update(json.dumps([*about, *_content(parameter.detach())]).encode())
    return state.hexdigest()


def fingerprint_at_start(student: nn.Module) -> str:
    """Of the weights that a training begins with, whether its adapter has been put on yet or not: one that does
    nothing yet does not count, nor does how its base is wrapped. All ranks call this."""
    named = dict(student.named_parameters())
    written = [p for name, p in named.items() if "lora_B" in name or "lora_embedding_B" in name]
    idle = not any(bool(_whole(parameter).any()) for parameter in written)
    state = hashlib.blake2b(digest_size=16)
    for name, parameter in named.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        of_adapter = "lora_" in plain or "modules_to_save" in plain
        if idle and of_adapter:
            continue
        values = _whole(parameter)
        state.update(json.dumps([plain, list(values.shape), str(values.dtype), *_content(values)]).encode())
    return state.hexdigest()


def _whole(parameter: Tensor) -> Tensor:
    with gathered([parameter]), torch.no_grad():
        return parameter.detach().clone() if hasattr(parameter, "ds_id") else parameter.detach()


def _content(values: Tensor) -> list[int]:
    """The sum of all 64-bit words (modulo 2^64: in any order), some of the words, and the odd bytes at the end."""
    flat = values.contiguous().view(-1).view(torch.uint8)
    if flat.device.type not in ("cpu", "cuda") or flat.storage_offset() % 8:
        flat = flat.cpu().clone()
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    sample = words[:: max(1, len(words) // _SAMPLES)]
    return [int(words.sum()), *sample.tolist(), *flat[whole:].tolist()]


def _config(model: nn.Module) -> Any:
    """The config without what says nothing about the completions: names, versions, how attention is computed."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return comparable(to_dict(), _says_something) if to_dict is not None else None


def _says_something(key: str) -> bool:
    return key[:1] != "_" and key not in ("transformers_version", "architectures", "use_cache", "dtype", "torch_dtype")


def comparable(value: Any, counts: Callable[[str], bool] = lambda key: True) -> Any:
    """JSON, with the text of what is not JSON; an object whose text is its address is equal to nothing.

    `counts`: which keys of dictionaries are kept.
    """
    if isinstance(value, Mapping):
        return {str(key): comparable(item, counts) for key, item in value.items() if counts(str(key))}
    if isinstance(value, (list, tuple)):
        return [comparable(item, counts) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if hasattr(value, "to_dict"):
        return comparable(value.to_dict(), counts)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
