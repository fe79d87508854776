"""Loading by name: tokenizer, configuration and teacher, errors name the fault (SFTTrainer loads the student)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME
from trl.trainer.utils import create_model_from_path

from gkd.models.placement import check_loading, check_not_split, split_while_loading
from gkd.models.quantized import keep_layout, with_quantization


@contextmanager
def load_errors_named(what: str, remedy: str) -> Iterator[None]:
    """Turn what the libraries raise for a folder that is missing, broken or of another kind into one line.

    Args:
        what: is loaded: the field and its value. remedy: what the user can do.

    Raises:
        ValueError: one of those.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system, and it names the file
        cause = f"no entry {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{what} cannot be loaded: {cause.rstrip('.')}; {remedy}") from error


_WHOLE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.gguf")
_NAME_A_MODEL = "name a folder with the whole model, or a model on the Hub"


def adapter_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """What the folder or repository of a PEFT adapter says about itself; None for anything else.

    Raises:
        ValueError: its file is broken.
    """
    path = Path(name) / ADAPTER_CONFIG_NAME
    if Path(name).is_dir():
        if not path.is_file() or any(any(Path(name).glob(pattern)) for pattern in _WHOLE_WEIGHTS):
            return None
    else:
        try:
            if isinstance(try_to_load_from_cache(name, CONFIG_NAME, revision=revision), str):
                return None  # a model on the Hub that is here already
            path = Path(hf_hub_download(name, ADAPTER_CONFIG_NAME, revision=revision))
        except (OSError, ValueError, HfHubHTTPError):
            return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    return found if isinstance(found, dict) and found.get("base_model_name_or_path") else None


def base_name(name: str, revision: str | None = None) -> str:
    """The base model's name where `name` is an adapter; else `name`."""
    found = adapter_config(name, revision)
    return name if found is None else str(found["base_model_name_or_path"])


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        ValueError: there is none under that name; with the remedy.
    """
    with load_errors_named(f"the tokenizer of {name!r}", f"save it beside the model, or {_NAME_A_MODEL}"):
        try:
            return _tokenizer(name, trust_remote_code, revision)
        except (OSError, ValueError, KeyError):
            base = base_name(name, revision)
            if base == name:
                raise
            return _tokenizer(base, trust_remote_code, None)  # an adapter that was saved alone


def _tokenizer(name: str, trust_remote_code: bool, revision: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    if tokenizer.get_vocab().keys() <= {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        # transformers makes an empty one of the model's config, which knows special tokens and no text
        raise ValueError("there are no tokenizer files (tokenizer.json, tokenizer_config.json)")
    return tokenizer


def load_config(name: str, *, field: str = "model_name_or_path", **options: Any) -> Any:
    """A model's config; of an adapter, its base's.

    Raises:
        ValueError: there is none under that name; `field` is where the name comes from. A teacher that is an adapter,
            which has a field of its own.
    """
    adapter = adapter_config(name, options.get("revision"))
    if adapter is not None:
        base = adapter["base_model_name_or_path"]
        if field != "model_name_or_path":
            raise ValueError(
                f"{field}={name!r} is an adapter of {base!r}: set {field}={base!r} and "
                f"teacher_adapter_name_or_path={name!r}"
            )
        name, options = base, {**options, "revision": adapter.get("revision")}
    with load_errors_named(f"{field}={name!r}", _NAME_A_MODEL):
        return AutoConfig.from_pretrained(name, **options)


def check_causal(model: Any, role: str) -> None:
    """Refuse models that do not continue a text from left to right.

    Args:
        model: a model or its config. role: "student" or "teacher".

    Raises:
        ValueError: an encoder-decoder, or a model that cannot generate.
    """
    config = getattr(model, "config", model)
    kind = type(model).__name__ if hasattr(model, "config") else str(getattr(config, "model_type", "model"))
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"the {role} is an encoder-decoder ({kind}), which is not supported: take a causal language model, which "
            "reads prompt and completion as one text"
        )
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and not can_generate():
        raise ValueError(
            f"the {role} ({kind}) cannot generate text: load it as a causal language model (AutoModelForCausalLM)"
        )


def generation_config_of(model: Any, options: dict[str, Any] | None = None) -> GenerationConfig | None:
    """The generation config of a model, or that of the model which a name stands for; None where there is none.

    Args:
        model: in memory, or its name.
        options: that it is loaded with; `revision` and `trust_remote_code` count.
    """
    if not isinstance(model, str):
        return getattr(model, "generation_config", None)
    chosen = {name: value for name, value in (options or {}).items() if name in ("revision", "trust_remote_code")}
    try:
        return GenerationConfig.from_pretrained(model, revision=chosen.get("revision"))
    except OSError:  # no such file: transformers makes one of the model's config
        pass
    try:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, **chosen))
    except (OSError, ValueError, KeyError):
        return None  # whoever loads the model says what is wrong


def safe_weights(name: str, init_kwargs: dict[str, Any] | None, field: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that load safetensors only, unless they say otherwise themselves.

    Older formats are pickles: to load one can be to run a program that somebody has put into it.

    Raises:
        ValueError: a local folder that has only those; with the remedy.
    """
    kwargs = {"use_safetensors": True, **(init_kwargs or {})}
    only_pickles = any(Path(name).glob("pytorch_model*.bin")) and not any(Path(name).glob("*.safetensors"))
    if kwargs["use_safetensors"] and "gguf_file" not in kwargs and only_pickles:
        raise ValueError(
            f"{name!r} holds its weights as a pickle (pytorch_model.bin), which may run any program when it is "
            f"loaded: convert them to safetensors, or, if you trust them, set {field}={{'use_safetensors': False}}"
        )
    return kwargs


def load_teacher(
    name: str, init_kwargs: dict[str, Any] | None, *, trust_remote_code: bool = False, placement: str = "same"
) -> PreTrainedModel:
    """Load a teacher; `init_kwargs` is not changed.

    Args:
        name: model name or path.
        init_kwargs: keyword arguments of `from_pretrained`; `dtype` as a string or a `torch.dtype`, quantization as a
            `BitsAndBytesConfig`, as a dict of its fields, or as those fields.
        trust_remote_code: whether code from the model's repository may run; off unless the user says so.
        placement: `teacher_placement`; the sharded ones split the weights up while they are loaded.

    Raises:
        ValueError: the model is not there or not in safetensors, `dtype` is not one, or the quantization is no such
            thing or does not go with the placement.
    """
    kwargs = safe_weights(name, init_kwargs, "teacher_model_init_kwargs")
    if "torch_dtype" in kwargs:  # the older spelling
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    dtype = kwargs.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        resolved = getattr(torch, dtype, None)
        if not isinstance(resolved, torch.dtype):
            raise ValueError(
                f"teacher_model_init_kwargs: dtype={dtype!r} is no torch dtype: use 'auto', 'bfloat16' or 'float32'"
            )
        kwargs["dtype"] = resolved
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    kwargs.setdefault("dtype", "auto")  # as saved: a bfloat16 teacher is not blown up to float32
    kwargs.setdefault("device_map", None)  # placed later: on this rank, or sharded
    try:
        whole = load_config(
            name,
            field="teacher_model_name_or_path",
            trust_remote_code=kwargs["trust_remote_code"],
            revision=kwargs.get("revision"),
        )
        check_causal(whole, "teacher")
        config = whole.get_text_config()
        full = kwargs["dtype"] if isinstance(kwargs["dtype"], torch.dtype) else config.dtype or torch.float32
        kwargs = with_quantization(kwargs, full, "teacher_model_init_kwargs")
        check_loading(kwargs, placement, getattr(config, "quantization_config", None) is not None)
        with split_while_loading(placement, full, int(config.hidden_size)):
            model = keep_layout(create_model_from_path(name, **kwargs))
    except (OSError, ImportError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"teacher_model_name_or_path={name!r} cannot be loaded: {cause}") from error
    check_not_split(model, "teacher")
    return model
