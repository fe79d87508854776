"""Tiny real models, a byte-level ChatML tokenizer and chat rows, shared by all tests. Nothing here is downloaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 256 + 3

CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

# A thinking model's template: it is served "<think>\n" to go on from, and leaves the thoughts of an answer out.
THINKING = CHATML.replace("(message['content'] or '')", "message['content'].split('</think>')[-1]").replace(
    "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"
)


def tiny_tokenizer(
    pad_is_eos: bool = False, padding_side: str = "right", chat_template: str | None = CHATML
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: ids 0..255 are bytes (in ByteLevel's order), then <|endoftext|>, <|im_start|>,
    and the eos <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (END_OF_TEXT, TURN_START, TURN_END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=TURN_END if pad_is_eos else END_OF_TEXT,
        padding_side=padding_side,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    assert len(tokenizer) == VOCABULARY
    return tokenizer


def _config_values(kind: str, hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    if kind in ("gpt2", "gpt_neo", "gptj"):
        return {"vocab_size": vocab, "n_embd": hidden, "n_layer": layers, "n_head": 2, "n_positions": 1024}
    values: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
    }
    if kind not in ("gpt_neox", "phi", "opt", "bloom"):
        values["num_key_value_heads"] = 1
    if kind.startswith("gemma") or kind == "qwen3":
        values["head_dim"] = hidden // 2
    if kind == "cohere":
        values["logit_scale"] = 0.7  # the default 0.0625 would leave logits that are nearly all equal
    return values


def tiny_model(
    kind: str = "qwen2", hidden: int = 32, layers: int = 2, vocab: int = VOCABULARY, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random fp32 causal language model of any transformers model type, in eval mode, logits far from uniform.

    `overrides` go to the config (`tie_word_embeddings=True`, `final_logit_softcapping=5.0`, ...). The draw
    depends on `seed` only; the global random stream is left where it was.
    """
    values = _config_values(kind, hidden, layers, vocab)
    values |= {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256}
    config = AutoConfig.for_model(kind, **(values | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model.eval()


_TEXT = {"gemma3": "gemma3_text", "mllama": "mllama_text_model", "smolvlm": "llama", "llava": "qwen2"}


def tiny_vision_model(kind: str = "gemma3", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model for images and text, with a tower for the images that text never reaches."""
    text = _config_values("gemma3_text", 32, 2, VOCABULARY) | {"initializer_range": 0.2, "pad_token_id": 256}
    text |= {"model_type": _TEXT[kind], "num_key_value_heads": 2, "eos_token_id": 258, "bos_token_id": 256}
    if kind == "mllama":
        rope = {"rope_type": "default", "rope_theta": 1e4}
        text |= {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": rope}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "projection_dim": 16, "vision_output_dim": 16}
    vision |= {"attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0], "max_num_tiles": 1}
    if kind == "mllama":
        vision |= {"vision_output_dim": 32, "supported_aspect_ratios": [[1, 1]]}
    if kind == "llava":
        vision |= {"model_type": "clip_vision_model"}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, pad_token_id=256, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=258, pad_token_id=256)
    return model.eval()


_WORDS = [
    "red",
    "blue",
    "one",
    "two",
    "apples",
    "river",
    "the",
    "a",
    "in",
    "under",
    "sings",
    "é",
    "7",
    "340",
    "!",
    ",",
]


def _sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(words))


def tiny_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` rows `{"messages": [...]}` with prompts of 1-8 and answers of 1-12 words; some have a system turn."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        messages = [{"role": "user", "content": _sentence(draw, draw.randint(1, 8))}]
        if draw.random() < 0.3:
            messages.insert(0, {"role": "system", "content": _sentence(draw, 2)})
        messages.append({"role": "assistant", "content": _sentence(draw, draw.randint(1, 12))})
        rows.append({"messages": messages})
    return rows


def save_tiny(
    path: str | Path,
    kind: str = "qwen2",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_options: Any,
) -> str:
    """Saves a tiny model and its tokenizer as one folder that `from_pretrained` can load; returns the folder."""
    tiny_model(kind, **model_options).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return str(path)
