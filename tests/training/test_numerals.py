"""A model taught by itself, which reads and writes numbers digit by digit there: its numerals stay likely.

Comparing tokens of one spelling alone would teach it that "34" does not follow: a teacher of digits never says it.
What stands behind a number is another matter (docs/teachers/other_tokenizer.md, "Limits").
"""

import copy
import random

import torch
from datasets import Dataset
from tiny import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from training import config, logged
from transformers import PreTrainedTokenizerFast

from gkd.data.token_bytes import token_bytes
from gkd.training.trainer import GKDTrainer

END, DIGITS = "</s>", "0123456789"
PAIRS = [(a, b) for a in DIGITS for b in DIGITS]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer_of(tokens, merges):
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


NUMBERS = tokenizer_of([END, *LETTERS, *(a + b for a, b in PAIRS)], PAIRS)
SINGLE = tokenizer_of([*reversed(LETTERS), END], [])


# What each kind of thing costs, and how often: texts that are beginnings of others.
COSTS = {"small": ([1, 12, 128, 7], [4, 3, 2, 1]), "large": ([34, 340, 345, 3400], [1, 4, 3, 2])}


def rows(number, seed):
    draw, found = random.Random(seed), []
    for _ in range(number):
        kind = draw.choice(list(COSTS))
        costs = draw.choices(*COSTS[kind], k=2)
        found.append({"prompt": f"a {kind} 56:", "completion": f" costs {costs[0]} or {costs[1]}"})
    return found


def both_ways(row):
    """The ids of a row, of numbers and of digits alone, in the student's numbering."""
    own = NUMBERS.get_vocab()
    text = row["prompt"] + row["completion"]
    single = [own[token] for token in SINGLE.convert_ids_to_tokens(SINGLE(text).input_ids)]
    return [*NUMBERS(text).input_ids, own[END]], [*single, own[END]]


def padded(texts):
    rows = [torch.tensor(ids) for ids in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def trained_model(steps=200):
    """It has read both ways of writing numbers, one in each text."""
    model = tiny_model(hidden=64, vocab=len(NUMBERS), seed=0, initializer_range=0.05, eos_token_id=0, pad_token_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    texts = [ids for row in rows(steps * 16, seed=1) for ids in both_ways(row)]
    for step in range(steps):
        batch = padded(texts[step * 32 : (step + 1) * 32])
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        logits = model(input_ids=batch.clamp(min=0)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def of_digits(model):
    """The same model, with the other tokenizer's numbering of the tokens."""
    other, theirs = copy.deepcopy(model), SINGLE.get_vocab()
    order = sorted(NUMBERS.get_vocab().items(), key=lambda item: theirs.get(item[0], len(theirs) + item[1]))
    old = torch.tensor([i for _, i in order])
    for table in (other.get_input_embeddings(), other.get_output_embeddings()):
        table.weight.data = table.weight.data[old].clone()
    end = theirs[END]
    other.config.eos_token_id = other.config.pad_token_id = end
    other.generation_config.eos_token_id = other.generation_config.pad_token_id = end
    return other


@torch.no_grad()
def nll_of_numerals(model):
    """-log p of the completions' numerals, for each of their bytes."""
    texts, digits = token_bytes(NUMBERS), DIGITS.encode()
    total, number = 0.0, 0
    for row in rows(100, seed=2):
        ids = both_ways(row)[0]
        log_p = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        begin = len(row["prompt"])
        for place, token in enumerate(ids):
            text = texts[token] or b""
            if begin <= 0 and text and text[0] in digits:
                total, number = total - log_p[place - 1, token].item(), number + len(text)
            begin -= len(text)
    return total / number


def test_numerals_stay_as_likely_as_they_were(tmp_path):
    model = trained_model()
    before = nll_of_numerals(model)
    trainer = GKDTrainer(
        model=model,
        teacher_model=of_digits(model),
        args=config(
            tmp_path,
            teacher_tokenizer_alignment="bytes",
            lmbda=0.5,
            max_steps=100,
            optim="adamw_torch",
            learning_rate=3e-4,
            per_device_train_batch_size=8,
            max_new_tokens=16,
            logging_steps=100,
        ),
        train_dataset=Dataset.from_list(rows(400, seed=3)),
        processing_class=NUMBERS,
        teacher_processing_class=SINGLE,
    )
    trainer.train()
    assert 0.05 < logged(trainer, "aligned/in_text/data")[0] < 0.5
    assert nll_of_numerals(model) / before < 1.02
