"""Facts of a loaded model: its name and revision, the sizes of its vocabulary and head, its longest sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME

from gkd.models.loading import load_config


def model_name(model: Any) -> str | None:
    """The name or path that a model was loaded from, None for one made in memory."""
    if isinstance(model, str):
        return model
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or None


def revision_of(model: Any, init_kwargs: dict[str, Any] | str | None = None) -> str | None:
    """The commit on the Hub that a model was loaded from; None for a folder and for one made in memory.

    transformers 5 does not keep it in the config, so it is read off the cache's folder, where that is unambiguous.

    Args:
        model: with a `config`. init_kwargs: what it was loaded with; its `revision` counts.
    """
    name = model_name(model)
    known: str | None = getattr(model.config, "_commit_hash", None)
    if known is not None or name is None or Path(name).exists():
        return known
    asked = init_kwargs.get("revision") if isinstance(init_kwargs, dict) else None
    try:
        found = try_to_load_from_cache(name, CONFIG_NAME, revision=asked)
    except HFValidationError:  # a folder that is gone
        return None
    if not isinstance(found, str):
        return None
    snapshot = Path(found).parent
    # Somebody else may have loaded the model, at a revision of his choice: only one is there to choose from, or none.
    return snapshot.name if asked or len(list(snapshot.parent.iterdir())) == 1 else None


def vocabulary_rows(
    name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    field: str = "model_name_or_path",
) -> int:
    """Rows of a model's output head, from its config alone.

    Raises:
        ValueError: there is no model under that name.
    """
    config = load_config(name, field=field, trust_remote_code=trust_remote_code, revision=revision)
    return int(config.get_text_config().vocab_size)


def head_size(model: Any) -> int:
    """How many tokens a model's output head is for; the config's number, which also holds for a sharded model."""
    return int(model.config.get_text_config().vocab_size)


def position_limit(config: Any) -> tuple[int | None, bool]:
    """How many positions a model has, and whether that binds.

    Args:
        config: a transformers config.

    Returns:
        The number in `max_position_embeddings`, None where the config has none; False with rotary positions that are
        stretched (`rope_parameters` of another type than "default", YaRN for example: Qwen2.5's configs name the
        number before the stretching) and with ALiBi, where longer sequences are what the model is made for.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    room = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    stretched = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) != "default"
    binds = not (stretched or getattr(text, "alibi", False))
    return (int(room) if isinstance(room, int) and room > 0 else None), binds


def key_width(config: Any) -> int:
    """k: the width of all key heads together."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return (getattr(text, "num_key_value_heads", None) or heads) * width
