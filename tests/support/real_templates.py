"""The chat templates that TRL carries, each with a tokenizer that has its special tokens."""

import re
from functools import cache
from pathlib import Path

import trl
from tiny import tiny_tokenizer
from tokenizers import AddedToken

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))

# Where the models stop, by the beginning of a template's name: the tokenizer's eos, then the rest of the generation
# config's list. The longest beginning counts.
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<eos>", "<turn|>", "<|tool_response>"],
    "gemma": ["<eos>", "<end_of_turn>"],
    "gemma4": ["<eos>", "<turn|>", "<|tool_response>"],
    "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|endoftext|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "llama3_1": ["<|eot_id|>", "<|eom_id|>"],
    "llama3_2": ["<|eot_id|>", "<|eom_id|>"],
    "llava_next": ["</s>"],
    "muse_glimmer": ["<|eot|>", "<|eom|>"],
    "nemotron": ["<|im_end|>"],
    "phi3": ["<|endoftext|>", "<|end|>"],
    "qwen": ["<|im_end|>", "<|endoftext|>"],
    "smolvlm": ["<end_of_utterance>"],
}
_TOKENS = re.compile(
    r"<\|[A-Za-z0-9_]+\|>|<｜[^｜\s]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>|</?think>|</?s>|\[gMASK\]|<sop>"
)


def stops_of(name):
    return STOPS[max((beginning for beginning in STOPS if name.startswith(beginning)), key=len)]


@cache
def tokenizer_of(name):
    """The tiny tokenizer with the template and the tokens that are written in it."""
    source = (FOLDER / f"{name}.jinja").read_text()
    tokens = dict.fromkeys([*_TOKENS.findall(source), *stops_of(name), "<|bos|>"])
    tokenizer = tiny_tokenizer(chat_template=source)
    tokenizer.add_tokens([AddedToken(token, special="think>" not in token, normalized=False) for token in tokens])
    tokenizer.eos_token, tokenizer.bos_token = stops_of(name)[0], "<|bos|>"
    return tokenizer


def stop_ids_of(name):
    return tokenizer_of(name).convert_tokens_to_ids(stops_of(name))
