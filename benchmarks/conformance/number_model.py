"""One model of texts with numbers, in the tokens of a student that writes two digits at a time and of a teacher that
writes each by itself.

The model is a Markov chain over characters: a letter is followed by a letter or a digit, a first digit by a second one
or a letter, a second digit by a letter. So every number is one of the student's tokens, and what it says of the next
token is what the chain says, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conformance.spelling_cases import Spelling, Text

LETTERS, DIGITS = "abc", "0123"
CHARACTERS = LETTERS + DIGITS
END = "<end>"
PAIRS = [first + second for first in DIGITS for second in DIGITS]
OTHERS = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(CHARACTERS))  # bytes that these texts have not
SURE = -30.0  # the logarithm of what does not happen


def tokenizer(longest: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE with numbers of up to so many digits as tokens."""
    pieces = [*CHARACTERS, *(PAIRS if longest == 2 else []), *OTHERS]
    merges = [(pair[0], pair[1]) for pair in pieces if len(pair) == 2]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    split = pre_tokenizers.Split(Regex(rf"\d{{1,{longest}}}|\D"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


@dataclass(frozen=True)
class NumberModel:
    """Attributes:
    after_letter: [letters, characters]. after_digit: [digits, characters], of a number's first digit.
    after_number: [digits, characters], of its second: digits have no part of it.
    """

    after_letter: Tensor
    after_digit: Tensor
    after_number: Tensor

    @classmethod
    def drawn(cls, generator: torch.Generator) -> NumberModel:
        def table(rows: int, digits: bool) -> Tensor:
            weights = torch.rand(rows, len(CHARACTERS), generator=generator, dtype=torch.float64) + 0.1
            weights[:, len(LETTERS) :] *= digits
            return weights / weights.sum(-1, keepdim=True)

        return cls(table(len(LETTERS), True), table(len(DIGITS), True), table(len(DIGITS), False))

    def next_character(self, text: str) -> Tensor:
        """Probabilities behind a text."""
        last = text[-1]
        if last in LETTERS:
            return self.after_letter[LETTERS.index(last)]
        table = self.after_number if text[-2:-1] in [*DIGITS] else self.after_digit
        return table[DIGITS.index(last)]

    def text(self, length: int, generator: torch.Generator) -> str:
        """A text that begins and ends with a letter."""
        text = LETTERS[0]
        while len(text) < length or text[-1] not in LETTERS:
            text += CHARACTERS[int(self.next_character(text).multinomial(1, generator=generator))]
        return text

    def student_logits(self) -> dict[str, Tensor]:
        """What the student says behind each of its tokens, by name: exactly what the model says."""
        tokens = [*CHARACTERS, *PAIRS]
        found = {}
        for before in tokens:
            behind = self.next_character("a" + before)
            table = torch.full((len(tokens) + len(OTHERS) + 1,), SURE, dtype=torch.float64)
            for v, token in enumerate(tokens):
                first = behind[CHARACTERS.index(token[0])]
                if before in DIGITS and token[0] in DIGITS:
                    continue  # a digit by itself is a whole number
                if before in DIGITS:
                    first = first / behind[: len(LETTERS)].sum()
                rest = self.after_digit[DIGITS.index(token[0])] if token[0] in DIGITS else None
                if len(token) == 2:
                    first = first * rest[CHARACTERS.index(token[1])]
                elif rest is not None:
                    first = first * rest[: len(LETTERS)].sum()
                if first > 0:
                    table[v] = first.log()
            found[before] = table
        return found


def learnt(way: Callable[[Text], Tensor], steps: int, rate: float = 0.01) -> list[tuple[float, float]]:
    """The student's mean NLL of a numeral, and of any token, in held-out text, before and after so many steps of
    Adam."""
    generator = torch.Generator().manual_seed(5)
    model = NumberModel.drawn(generator)
    student, teacher = tokenizer(2), tokenizer(1)
    names = [*CHARACTERS, *PAIRS]
    table = torch.stack([model.student_logits()[name] for name in names]).requires_grad_()
    held_out = [model.text(400, generator) for _ in range(4)]
    before = _costs(table, student, held_out)
    optimizer = torch.optim.Adam([table], lr=rate)
    for _ in range(steps):
        text = _seen_by_both(table, model, model.text(60, generator), student, teacher)
        optimizer.zero_grad()
        way(text).backward()
        optimizer.step()
    return list(zip(before, _costs(table, student, held_out), strict=True))


def _costs(table: Tensor, student: PreTrainedTokenizerBase, texts: list[str]) -> list[float]:
    log_probs, numerals, tokens = table.detach().log_softmax(-1), [], []
    for text in texts:
        for before, token in pairwise(student(text)["input_ids"]):
            tokens.append(-log_probs[before, token].item())
            numerals += tokens[-1:] if token >= len(LETTERS) else []
    return [sum(numerals) / len(numerals), sum(tokens) / len(tokens)]


def _seen_by_both(
    table: Tensor, model: NumberModel, text: str, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> Text:
    sides = []
    for side in (student, teacher):
        pieces = [name.encode() for name in side.convert_ids_to_tokens(list(range(len(side))))]
        sides.append(Spelling(pieces, [*side(text)["input_ids"], len(pieces) - 1], 1, side))
    ours = table[sides[0].ids[:-1]]
    theirs = torch.full((len(sides[1].ids), len(sides[1].pieces)), SURE, dtype=torch.float64)
    for place in range(len(text)):
        theirs[place, : len(CHARACTERS)] = model.next_character(text[: place + 1]).log().clamp_min(SURE)
    ours = torch.cat([ours, ours[-1:]])
    return Text(sides[0], sides[1], ours, theirs)
