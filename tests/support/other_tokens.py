"""A tokenizer with other tokens than the tests' own: the bytes in another order, pairs of letters, another end."""

from __future__ import annotations

from typing import Any

from tiny import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

START, END = "<s>", "</s>"
TEMPLATE = (
    "{{ '<s>' }}{%- for message in messages -%}"
    "{{ '[' + message['role'] + '] ' + message['content'] }}{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '[assistant] ' }}{%- endif -%}"
)
_MERGES = [("r", "e"), ("re", "d"), ("t", "h"), ("th", "e"), ("Ġ", "a"), ("o", "n"), ("on", "e"), ("3", "4")]


def other_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Ids 0 and 1 are its special tokens, which are bytes in the tests' own tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    tokens = [START, END, *letters, *(a + b for a, b in _MERGES)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=_MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (START, END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=START, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def other_model(seed: int = 3, **overrides: Any) -> PreTrainedModel:
    """A model of that tokenizer's, with a few rows of padding in its head."""
    values = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **overrides}
    model = tiny_model("llama", vocab=len(other_tokenizer()) + 6, seed=seed, **values)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1)
    return model
