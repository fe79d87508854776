"""Weights of 4 or 8 bits through bitsandbytes: from keyword arguments to its configuration.

4 bits: NF4 with a scale for every 64 weights (Dettmers et al., arXiv 2305.14314). 8 bits: one scale a row, columns
with outliers apart (Dettmers et al., arXiv 2208.07339). Embeddings and output head stay as they were saved.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

_SWITCHES = ("load_in_4bit", "load_in_8bit")
_SAVED_BESIDE = ("quant_method", "_load_in_4bit", "_load_in_8bit")  # what a saved one says twice
_KNOWN = frozenset(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}


def with_quantization(kwargs: dict[str, Any], dtype: torch.dtype, field: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`, what they say about 4 or 8 bits made into a `BitsAndBytesConfig`.

    Args:
        kwargs: with `load_in_4bit`, `load_in_8bit` and other fields of `BitsAndBytesConfig` among them, or with a
            `quantization_config`, which may be a dict of them. It is not changed.
        dtype: of the weights that stay as they are; 4-bit weights are unpacked to it unless they say otherwise.
        field: what to name in an error.

    Raises:
        ValueError: an unknown option, both forms at once, or bitsandbytes is missing.
    """
    flat = {name: value for name, value in kwargs.items() if name in _KNOWN}
    rest = {name: value for name, value in kwargs.items() if name not in _KNOWN}
    given = rest.get("quantization_config")
    if flat and given is not None:
        raise ValueError(
            f"{field} has quantization_config and {', '.join(sorted(flat))} side by side: put all of it into one"
        )
    if isinstance(given, dict) and given.get("quant_method", "bitsandbytes") == "bitsandbytes":
        flat = {name: value for name, value in given.items() if name not in _SAVED_BESIDE}
    if flat:
        rest["quantization_config"] = _bits_and_bytes(flat, dtype, field)
    if isinstance(rest.get("quantization_config"), BitsAndBytesConfig):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"{field} asks for 4 or 8 bits, and bitsandbytes is missing: pip install bitsandbytes")
        _log_once("bitsandbytes.autograd._functions")
    return rest


def _bits_and_bytes(options: dict[str, Any], dtype: torch.dtype, field: str) -> BitsAndBytesConfig:
    unknown = sorted(set(options) - _KNOWN)
    if unknown:
        raise ValueError(
            f"{field}: BitsAndBytesConfig has no {', '.join(unknown)}; it has {', '.join(sorted(_KNOWN))}"
        )
    chosen = [name for name in _SWITCHES if options.get(name)]
    if len(chosen) != 1:
        raise ValueError(f"{field}={options} quantizes to nothing: set one of {' and '.join(_SWITCHES)} to true")
    if chosen == ["load_in_4bit"]:
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, **options}
    return BitsAndBytesConfig(**options)


def keep_layout(model: Any) -> Any:
    """The model, its 4-bit weights kept as they were loaded, also on processors with AVX512-BF16.

    There bitsandbytes (0.50) packs the weights of a layer anew when it first runs in eval mode, for a kernel without a
    gradient: a student that has written a rollout would then train without one, or fail. A teacher's fingerprint
    would be another one after it has scored, and another model over the same weights would read them wrongly.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # gives a layer that is packed already its own layout back (its scales stay rounded)
    return model


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.seen
        self.seen.add(message)
        return new


def _log_once(name: str) -> None:
    """Each message of this logger once: some come with every layer of every forward pass."""
    logger = logging.getLogger(name)
    if not any(isinstance(own, _Once) for own in logger.filters):
        logger.addFilter(_Once())
