"""Random models at the shapes of Qwen2.5, a byte-level tokenizer and rows: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Shape:
    """A model's size: `layers` may be cut for checks that do not time anything."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int


STUDENT = Shape(151_936, 896, 4_864, 24, 14)  # Qwen2.5-0.5B
TEACHER = Shape(151_936, 1_536, 8_960, 28, 12)  # Qwen2.5-1.5B
TINY = Shape(503, 64, 128, 2, 2)  # on a CPU, to see that the script runs


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and two more."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(token_models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(PAD, special=True), AddedToken(END, special=True)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END)
    made.chat_template = TEMPLATE
    return made


def save_model(folder: Path, shape: Shape, seed: int, layers: int | None = None) -> str:
    """A random model in bf16, with its tokenizer, that `from_pretrained` loads; the same for equal arguments."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id)
    model.save_pretrained(folder)
    ids.save_pretrained(folder)
    return str(folder)


def rows(number: int = 64) -> Dataset:
    """Chats of uneven length."""
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": "abc " * (5 + i % 40)},
                    {"role": "assistant", "content": "def " * (5 + i % 30)},
                ]
            }
            for i in range(number)
        ]
    )
