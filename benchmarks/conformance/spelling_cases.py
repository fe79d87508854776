"""Cases about teachers of another tokenizer: one text in the tokens of two vocabularies.

T positions and V vocabulary of the student, Tt and Vt of the teacher. Whole sequences, behind prompts that are not of
the same length (one may begin with a BOS): the logits of a position predict the token behind it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import regex
import torch
from torch import Tensor

from conformance.definition import jsd
from conformance.result import Case, Result, judged

END_PIECE = b"<end>"


@dataclass(frozen=True)
class Spelling:
    """A vocabulary of texts, in which the last entry ends a turn, and a text in its tokens.

    `tokenizer` is one that writes them, where a case has one.
    """

    pieces: list[bytes]
    ids: list[int]
    prompt_length: int
    tokenizer: Any = None

    @property
    def completion(self) -> list[int]:
        return self.ids[self.prompt_length :]

    @property
    def places(self) -> list[int]:
        """The positions that predict the completion's text, its end of turn left out."""
        return list(range(self.prompt_length - 1, len(self.ids) - 2))

    def get_vocab(self) -> dict[str, int]:
        """As a tokenizer tells it."""
        return {piece.decode("latin-1"): i for i, piece in enumerate(self.pieces)}


@dataclass(frozen=True)
class Text:
    """Attributes:
    student, teacher: the spellings of one text.
    logits: [T, V] of the student, a leaf. teacher_logits: [Tt, Vt].
    beta: of the divergence where both stand at the same place.
    """

    student: Spelling
    teacher: Spelling
    logits: Tensor
    teacher_logits: Tensor
    beta: float = 0.5
    leaf: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaf", self.logits)


def spelled(pieces: list[bytes], tokens: list[bytes], prompt: int) -> Spelling:
    """A prompt of the first tokens of the vocabulary, then these tokens and the end of the turn."""
    known = [*pieces, END_PIECE]
    ids = [i % len(pieces) for i in range(prompt)] + [known.index(token) for token in [*tokens, END_PIECE]]
    return Spelling(known, ids, prompt)


def drawn(student: Spelling, teacher: Spelling, seed: int = 0) -> Text:
    """Random logits for both."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(side.ids), len(side.pieces)) for side in (student, teacher)]
    logits = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return Text(student, teacher, logits[0].requires_grad_(), logits[1])


def _best(adapter: Any, ask: Callable[[Callable[[Text], Tensor]], Result]) -> Result:
    """The best verdict among the ways that a peer offers."""
    ways = adapter.ways()
    found = {name: ask(way) for name, way in ways.items()}
    good = [one for one in found.values() if one.verdict == "pass"]
    if good:
        return good[0]
    return Result("fail", "; ".join(f"{name}: {one.detail}" if name else one.detail for name, one in found.items()))


LETTERS = [b"a", b"b", b"c", b"d", b"ab", b"cd", b"bc", b"abcd", b"abc"]
# name: the middle of the text in the student's tokens, and in the teacher's
MERGES = {
    "1-1": ([b"ab"], [b"ab"]),
    "1-n": ([b"abcd"], [b"a", b"bc", b"d"]),
    "n-1": ([b"ab", b"c", b"d"], [b"abcd"]),
    "n-m": ([b"ab", b"cd"], [b"a", b"bc", b"d"]),
}


def _positions(adapter: Any, name: str) -> Result:
    """Gradient reaches every position that predicts the text, and no other."""
    ours, theirs = MERGES[name]

    def ask(way: Callable[[Text], Tensor]) -> Result:
        for prompt, other in ((3, 3), (3, 5), (6, 2)):
            student = spelled(LETTERS, [b"d", *ours, b"c"], prompt)
            teacher = spelled(LETTERS, [b"d", *theirs, b"c"], other)
            text = drawn(student, teacher)
            (gradient,) = torch.autograd.grad(way(text), text.leaf)
            reached = set(gradient.abs().sum(-1).gt(1e-12).nonzero()[:, 0].tolist())
            last = len(student.ids) - 2  # where the end of the turn is predicted: compared or not
            if reached - {last} != set(student.places):
                return Result("fail", f"positions {sorted(reached)}, right are {student.places}")
        return Result("pass", "every position that predicts, behind prompts of three lengths")

    return _best(adapter, ask)


SYMBOLS = [b"0", b"1", b"2", b"3"]
LEFT = [b"0", b"1", b"2", b"30", b"31", b"32", b"33"]
RIGHT = [b"0", b"1", b"3", b"20", b"21", b"230", b"231", b"232", b"233", b"22"]
PAIRS = [a + b for a in SYMBOLS for b in SYMBOLS]


def _view(code: list[bytes], chain: Tensor, text: bytes) -> tuple[Spelling, Tensor]:
    """A Markov chain of symbols in a code of which no token begins another: tokens, and exact log-probabilities."""
    table = torch.full((len(SYMBOLS), len(code) + 1), -40.0, dtype=torch.float64)  # a text never ends by itself
    for before in range(len(SYMBOLS)):
        for v, token in enumerate(code):
            states = [before, *(int(chr(symbol)) for symbol in token)]
            table[before, v] = sum(chain[a, b].log() for a, b in pairwise(states))
    tokens = _tokens(code, text)
    spelling = spelled(code, tokens, 2)
    logits = torch.zeros(len(spelling.ids), len(code) + 1, dtype=torch.float64)
    state = int(chr(text[0]))
    for place, token in enumerate([*tokens, None], spelling.prompt_length - 1):
        logits[place] = table[state]
        state = int(chr(token[-1])) if token else state
    return spelling, logits


def _tokens(code: list[bytes], text: bytes) -> list[bytes]:
    """A text behind its first symbol, as far as it is whole tokens."""
    tokens, at = [], 1
    while (token := next((t for t in code if text.startswith(t, at)), None)) is not None:
        tokens.append(token)
        at += len(token)
    return tokens


def _cut(text: bytes, left: list[bytes], right: list[bytes]) -> bytes:
    """The text up to where both codes have last a border."""
    ends = [set(accumulate(map(len, _tokens(code, text)))) for code in (left, right)]
    return text[: 1 + max(ends[0] & ends[1])]


def one_model(adapter: Any) -> Result:
    """Student and teacher are one byte-level Markov model in two codes: loss and gradient are 0."""
    generator = torch.Generator().manual_seed(3)
    chain = torch.rand(4, 4, generator=generator, dtype=torch.float64).add(0.1)
    chain /= chain.sum(-1, keepdim=True)
    text = bytes(48 + s for s in torch.randint(0, 4, (120,), generator=generator).tolist())

    def ask(way: Callable[[Text], Tensor]) -> Result:
        worst = [0.0, 0.0]
        for left, right in ((SYMBOLS, PAIRS), (PAIRS, SYMBOLS), (LEFT, RIGHT), (RIGHT, LEFT)):
            (student, ours), (teacher, theirs) = (_view(c, chain, _cut(text, left, right)) for c in (left, right))
            one = Text(student, teacher, ours.requires_grad_(), theirs)
            loss = way(one)
            (gradient,) = torch.autograd.grad(loss, one.leaf)
            worst = [max(worst[0], abs(loss.item())), max(worst[1], float(gradient.abs().max()))]
        return judged(max(worst) < 1e-6, f"loss {worst[0]:.1g}, gradient {worst[1]:.1g}")

    return _best(adapter, ask)


def same_tokenizer(adapter: Any) -> Result:
    """A teacher with the same tokens gives the ordinary divergence."""

    def ask(way: Callable[[Text], Tensor]) -> Result:
        side = spelled(LETTERS, [b"ab", b"c", b"d", b"abc", b"d"], 3)
        text = drawn(side, side)
        loss = way(text)
        (gradient,) = torch.autograd.grad(loss, text.leaf)
        counted = [*side.places, len(side.ids) - 2] if gradient[-2].any() else side.places
        exact = text.logits.detach().requires_grad_()
        wanted = jsd(exact[counted].log_softmax(-1), text.teacher_logits[counted].log_softmax(-1), text.beta).mean()
        (right,) = torch.autograd.grad(wanted, exact)
        error = max(abs(float(loss - wanted)), float((gradient - right).abs().max()))
        return judged(error < 1e-6, f"loss {loss.item():.4g}, ordinary {wanted.item():.4g}")

    return _best(adapter, ask)


def numbers(adapter: Any) -> Result:
    """A model of numbers, written two digits at a time, learns 100 steps from itself under a tokenizer that writes
    each digit by itself: the likelihood of its numerals stays (the NLL of a numeral rises by less than 2 %)."""
    from conformance import number_model

    def ask(way: Callable[[Text], Tensor]) -> Result:
        (before, after), (all_before, all_after) = number_model.learnt(way, steps=100)
        words = f"{after / before - 1:+.1%} for a numeral, {all_after / all_before - 1:+.1%} for any token"
        return judged(after < 1.02 * before, f"NLL {words}")

    return _best(adapter, ask)


# The letters that byte-level tokenizers write bytes with (GPT-2): printable ones as they are, the others from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = [*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE)]
_LETTERS = [*map(chr, _PRINTABLE), *(chr(256 + i) for i in range(256 - len(_PRINTABLE)))]


def _pieces(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """The bytes of tokens: of byte-level ones by its letters for bytes, of SentencePiece's by its blanks and codes."""
    letters = dict(zip(_LETTERS, _BYTES, strict=True))
    found = []
    for token in tokenizer.convert_ids_to_tokens(ids):
        if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder):
            found.append(bytes(letters[letter] for letter in token))
        elif code := re.fullmatch("<0x(..)>", token):
            found.append(bytes.fromhex(code[1]))
        else:
            found.append(token.replace("▁", " ").encode())
    return found


def _random_texts(adapter: Any, kinds: tuple[str, str], number: int) -> Result:
    adapter.ways()  # who has none says so here
    import spellings

    student, teacher = (spellings.tokenizer(kind) for kind in kinds)
    draw, longest = random.Random(11), 0
    for _ in range(number):
        text = spellings.random_text(draw)
        sides = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)]
        groups = adapter.groups(student, teacher, text, *sides)
        pieces = [_pieces(tokenizer, ids) for tokenizer, ids in zip((student, teacher), sides, strict=True)]
        for side in (0, 1):
            if [i for group in groups for i in group[side]] != list(range(len(sides[side]))):
                return Result("fail", f"{text!r}: a token is in no group or in two"[:120])
        for count, group in enumerate(groups):
            ours, theirs = (b"".join(pieces[side][i] for i in group[side]) for side in (0, 1))
            if ours != theirs and (count or ours.lstrip(b" ") != theirs.lstrip(b" ")):
                return Result("fail", f"{text!r}: a group is {ours!r} and {theirs!r}"[:120])
            alone = len(regex.findall(r"\X", ours.decode(errors="replace"))) == 1
            longest = max(longest, max(map(len, group)) * (not alone))
    return judged(longest <= 16, f"{number} texts, no group longer than {longest} tokens but for single graphemes")


def random_texts(adapter: Any) -> Result:
    """Emoji, scripts, accents, digits and blanks in two byte-level tokenizers, trained here: each group is the same
    bytes on both sides, and every token is in one."""
    return _random_texts(adapter, ("numbers", "digits"), 500)


def random_texts_in_pieces(adapter: Any) -> Result:
    """The same where the teacher's is SentencePiece's kind."""
    return _random_texts(adapter, ("digits", "pieces"), 500)


def _position_case(name: str) -> Callable[[Any], Result]:
    return lambda adapter: _positions(adapter, name)


GROUP = "A teacher with another tokenizer"
CASES = [
    *(Case(f"gradient where the text is predicted, {name}", GROUP, _position_case(name)) for name in MERGES),
    Case("one Markov model in two codes: loss 0, gradient 0", GROUP, one_model),
    Case("random texts, byte-level tokenizers: groups of the same bytes", GROUP, random_texts, cheap=False),
    Case("random texts, a SentencePiece teacher", GROUP, random_texts_in_pieces, cheap=False),
    Case("numbers, from a teacher that splits digits", GROUP, numbers),
    Case("the same tokenizer: the ordinary loss", GROUP, same_tokenizer),
]
