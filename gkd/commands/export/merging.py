"""An adapter added to its base model, saved whole, and compared with what it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from gkd.models.adapters import load_adapter, merged
from gkd.models.loading import adapter_config, load_config, load_errors_named, load_tokenizer
from gkd.models.quantized import with_quantization
from gkd.training.origin import read_origin

DTYPES = ("auto", "float32", "bfloat16", "float16")
PROBE = "The quick brown fox jumps over the lazy dog. 12 + 30 = 42, and the sky above the harbour was grey."


@dataclass(frozen=True)
class Merged:
    """What was saved.

    Attributes:
        folder: with the whole model. base: the model that the adapter was for; None for a run without one.
        bits: of the base's weights while the run trained, 4 or 8, which were unpacked; None for others.
        parameters: number of weights. dtype: theirs.
        largest_difference: of the logits, from base and adapter in the same precision, on a short text.
        largest_logit: of them, by absolute value.
    """

    folder: Path
    base: str | None
    bits: int | None
    parameters: int
    dtype: str
    largest_difference: float
    largest_logit: float


def save_merged(run: Path, folder: Path, dtype: str = "auto", *, trust_remote_code: bool = False) -> Merged:
    """Save a run's model whole, with tokenizer, chat template, generation config and card, and load it again.

    Args:
        run: a run's output folder, or one of its checkpoints: an adapter, or a whole model.
        folder: where to; it is made, and must be empty.
        dtype: of the saved weights; "auto" as the base model's are.
        trust_remote_code: let the model's own code run.

    Raises:
        ValueError: there is no model, its base cannot be loaded, or the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty: name another folder with --output")
    adapter = check_run(run)
    tokenizer = load_tokenizer(str(run), trust_remote_code=trust_remote_code)
    model, own, bits = _loaded(run, adapter, dtype, trust_remote_code)
    ids = _probe(tokenizer)
    before = _logits(model, ids)
    whole: Any = merged(model) if adapter else model
    whole.config.use_cache = True
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_card(run, folder, own)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    difference = (_logits(again, ids) - before).abs()
    return Merged(
        folder=folder,
        base=own,
        bits=bits,
        parameters=sum(p.numel() for p in again.parameters()),
        dtype=str(again.dtype).removeprefix("torch."),
        largest_difference=float(difference.max()),
        largest_logit=float(before.abs().max()),
    )


def check_run(run: Path) -> dict[str, Any] | None:
    """What the adapter there says of itself; None for a whole model.

    Raises:
        ValueError: there is neither.
    """
    if not run.is_dir():
        raise ValueError(f"there is no folder {str(run)!r}: name a run's output_dir, or one of its checkpoints")
    adapter = adapter_config(str(run))
    if adapter is None and not (run / CONFIG_NAME).is_file():
        kept = sorted(path.name for path in run.glob("checkpoint-*"))
        hint = f"it has {kept[-1]}, which can be exported" if kept else "a run saves it when it ends"
        raise ValueError(f"{str(run)!r} holds no {ADAPTER_CONFIG} and no model: {hint}")
    return adapter


def _loaded(
    run: Path, adapter: dict[str, Any] | None, dtype: str, trust_remote_code: bool
) -> tuple[nn.Module, str | None, int | None]:
    """The model, with its adapter beside its weights, the base's name and how many bits its weights had.

    Weights of 4 or 8 bits are unpacked; a base that the run had in so few is rounded as it was there, since the
    adapter has learnt what the rounding does.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    name = str(run)
    if adapter is not None:
        name, options["revision"] = str(adapter["base_model_name_or_path"]), adapter.get("revision")
        options |= _as_the_run_had_it(run, name, options["revision"], trust_remote_code)
    with load_errors_named(f"the model {name!r}", "the adapter's base has to be where it was, or on the Hub"):
        model: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    bits = None
    if getattr(model, "is_quantized", False):
        bits = next((number for number in (4, 8) if getattr(model, f"is_loaded_in_{number}bit", False)), None)
        model = model.dequantize()
        vars(model).pop("_weight_conversions", None)  # of packed weights, which transformers cannot take back
        if dtype != "auto":
            for weight in model.parameters():  # not the buffers: rotary frequencies stay in float32
                weight.data = weight.data.to(getattr(torch, dtype))
    if adapter is None:
        return model.eval(), None, bits
    return load_adapter(model, str(run), "RUN"), name, bits


def _as_the_run_had_it(run: Path, base: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Options that round a base, whole on disk, as `load_in_4bit` and the like did for the run."""
    packed = read_origin(run).quantization
    if packed is None:
        return {}
    config = load_config(base, field="the base", trust_remote_code=trust_remote_code, revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        return {}  # it is packed on disk
    return with_quantization({"quantization_config": packed}, torch.float32, "the run's student")


def _probe(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A short text, in the chat template where there is one, as ids [1, T]."""
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(PROBE)["input_ids"]])
    turns = [{"role": "user", "content": PROBE}]
    found = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return torch.tensor([list(found["input_ids"])])


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return torch.as_tensor(model(input_ids=ids).logits).float()


def _write_card(run: Path, folder: Path, base: str | None) -> None:
    """The run's card, as that of a whole model: hubs ask `library_name` how to load it."""
    source = run / "README.md"
    if not source.is_file():
        return
    card = ModelCard.load(source)
    card.data.library_name = "transformers"
    if base is not None:
        card.data.base_model_relation = "finetune"
    card.save(folder / "README.md")


def is_chat_model(folder: Path) -> bool:
    """Whether its tokenizer has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and "chat_template" in json.loads(path.read_text(encoding="utf-8"))
