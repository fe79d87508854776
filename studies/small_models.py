"""Models of seconds for the studies: a token for each letter, Llamas of some thousand weights, a plain loop to train
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"
Batch = tuple[Tensor, Tensor]  # ids [B, T], and for each the probabilities of the token behind it [B, T, V], or zeros


class Letters:
    """An alphabet as token ids; 0 pads, 1 ends."""

    def __init__(self, letters: str) -> None:
        self.tokens = [PAD, END, *letters]
        self.ids = {token: number for number, token in enumerate(self.tokens)}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token for each letter."""
        backend = Tokenizer(WordLevel(self.ids, unk_token=PAD))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        backend.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END)

    def model(self, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
        """A random one."""
        config = LlamaConfig(
            vocab_size=len(self.tokens),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=self.ids[END],
            pad_token_id=self.ids[PAD],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(eos_token_id=self.ids[END], pad_token_id=self.ids[PAD])
        return model

    def texts(self, pairs: Sequence[tuple[str, str]]) -> Batch:
        """Prompts with their answers and the end: the answers' tokens are the targets."""
        lines = [[self.ids[letter] for letter in prompt + answer] + [self.ids[END]] for prompt, answer in pairs]
        width = max(map(len, lines))
        ids = torch.tensor([line + [self.ids[PAD]] * (width - len(line)) for line in lines])
        target = functional.one_hot(ids[:, 1:], len(self.tokens)).float()
        for row, (prompt, _) in enumerate(pairs):
            target[row, : len(prompt) - 1] = 0
            target[row, len(lines[row]) - 1 :] = 0
        return ids[:, :-1], target

    @torch.no_grad()
    def answers(
        self, model: Any, prompts: Sequence[str], *, greedy: bool, seed: int = 0, longest: int = 30
    ) -> list[str]:
        """One answer each; all prompts are of one length. Greedy, or sampled at T = 1."""
        step = torch.tensor([[self.ids[letter] for letter in prompt] for prompt in prompts])
        going = torch.ones(len(step), dtype=torch.bool)
        draw = torch.Generator().manual_seed(seed)
        cache, written = None, []
        while going.any() and len(written) < longest:
            out = model(step, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1]
            step = logits.argmax(-1, keepdim=True)
            if not greedy:
                step = torch.multinomial(logits.softmax(-1), 1, generator=draw)
            written.append(step)
            going &= step[:, 0] != self.ids[END]
        lines = ("".join(self.tokens[number] for number in row) for row in torch.cat(written, dim=1).tolist())
        return [line.partition(END)[0] for line in lines]

    def save(self, model: LlamaForCausalLM, folder: Path) -> None:
        """Model and tokenizer, as a recipe loads them."""
        model.save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)


def fit(
    model: LlamaForCausalLM,
    batch: Callable[[], Batch],
    most: int,
    rate: float,
    *,
    falls: bool = False,
    enough: Callable[[LlamaForCausalLM], bool] = lambda model: False,
) -> int:
    """Cross-entropy with AdamW, until it is `enough` (asked every 25 steps); returns the steps made.

    Args:
        model: it is changed.
        batch: the next one.
        most: steps.
        rate: the learning rate; it `falls` to 0 along one cycle, or stays.
        falls: see there.
        enough: whether to stop here.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=most, pct_start=0.1) if falls else None
    for step in range(1, most + 1):
        ids, target = batch()
        loss = -(target * model(ids).logits.log_softmax(-1)).sum() / target.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if step % 25 == 0 and enough(model):
            return step
    return most
