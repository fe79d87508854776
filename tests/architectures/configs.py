"""A tiny random model of every architecture that transformers can train as a causal language model.

`tiny_config` shrinks whatever fields a configuration class has (`_SMALL`), then applies what one family needs beside
(`FAMILIES`). A case of the matrix is a model type and a variant of it: another window, a cap on
the logits, tied heads.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 259  # of tests/support/tiny.py: the tokenizer is byte-level
STOPS = list(range(0, 258, 7))  # so many that rows leave the batch at different times
PAD = 256

# What each field becomes where a configuration has it. Sizes only: what a family computes stays as it is.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "dim_model": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "d_ff": 48,
    "dff": 48,
    "dim_ff": 48,
    "n_inner": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_intermediate_size": 16,
    "mlp_hidden_size": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "kv_channels": 8,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "max_sequence_length": 256,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "hidden_size_per_layer_input": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_headdim": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "n_groups": 1,
    "chunk_size": 16,
    "sliding_window": 128,
    "attention_window": 128,
    "local_attention": 128,
    "attention_chunk_size": 128,
    "index_topk": 64,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "laurel_rank": 4,
    "lru_width": 32,
    "zero_expert_num": 1,
    "use_mamba_kernels": False,
    "use_cache": True,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 257,
    "eos_token_id": 258,
}

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

# What a family needs beside its sizes.
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_VISION: dict[str, Any] = {"text_config": {"rope_parameters": _SECTIONS}}
FAMILIES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        "layer_types": ["full_attention", "full_attention"],
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4},
    "doge": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8, "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen2_5_vl": _QWEN_VISION | {"vision_config": {"depth": 1, "num_heads": 2, "out_hidden_size": 32}},
    "qwen2_vl": _QWEN_VISION | {"vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2}},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 128},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "num_query_groups": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "kv_channels": 8,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Encoders, encoder-decoders and what is no text model: nothing here trains them.
NOT_DECODERS = frozenset(
    {
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "fuyu",
        "git",
        "got_ocr2",
        "marian",
        "mbart",
        "megatron-bert",
        "moshi",
        "musicgen",
        "musicgen_melody",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    }
)
# Left out by name, each with what it lacks.
NOT_BUILT = {
    "blt": "reads bytes through hashed n-grams of half a million rows",
    "dbrx": "its attention reads a rope_theta that its configuration no longer has",
    "dots3_note": "its vision tower has no small shape",
    "dots3_note_text": "its hyper-connections have no small shape",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts from another model's hidden states",
    "gemma4_unified_assistant": "drafts from another model's hidden states",
    "phi4_multimodal": "its audio and vision towers have no small shape",
    "qwen4_exp": "its indexer has no default sizes",
    "qwen4_exp_text": "its indexer has no default sizes",
    "xlstm": "its cached state has another shape than its prefill asks for at small sizes",
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The configuration of `model_type` with small sizes and, where layers have types, each type at least once.

    Raises:
        KeyError: transformers has no such model type.
    """
    kind = CONFIG_MAPPING[model_type]
    return kind(**_merged(_merged(_shrunk(kind()), FAMILIES.get(model_type, {})), overrides))


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes`; those of a sub-configuration go into it."""
    nested = {n: _merged(values[n], c) for n, c in changes.items() if n.endswith("_config") and n in values}
    return values | changes | nested


def _shrunk(default: Any) -> dict[str, Any]:
    """What `_SMALL` makes of the fields that `default` sets, its sub-configurations included."""
    fields = default.to_dict()
    values = {name: small for name, small in _SMALL.items() if fields.get(name) is not None}
    if "qk_rope_head_dim" in values:  # latent attention has one key head for each query head
        values["num_key_value_heads"] = values["num_attention_heads"]
    if fields.get("layer_types"):
        kinds = list(dict.fromkeys(fields["layer_types"]))
        values["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        values |= {n: len(values["layer_types"]) for n in _LAYERS if n in values}
    for name, part in vars(default).items():
        if isinstance(part, PreTrainedConfig):
            values[name] = _shrunk(part) | {"model_type": part.model_type}
    return values


def tiny_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of this configuration in eval mode, with the stop and pad ids of the matrix.

    Raises:
        ValueError: it would be large: a size that `_SMALL` does not know.
    """
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > 3_000_000:
        raise ValueError(
            f"{config.model_type}: {size / 1e6:.0f}M parameters; a field of its configuration is not shrunk"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(eos_token_id=STOPS, pad_token_id=PAD)
    return model.eval()
