"""Tokenizers of several kinds, trained here on the project's own pages, and random texts to try them with."""

from __future__ import annotations

import functools
import json
import random
import unicodedata
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gkd.demo.texts import cache_folder

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs").glob("*.md"))
END = {"pieces": "</s>", "digits": "<|im_end|>", "numbers": "<|end|>", "composed": "<|im_end|>"}


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """pieces: SentencePiece's Unigram, a blank in front, bytes for what it lacks; digits: byte-level, digits alone;
    numbers: byte-level, three digits at once; composed: as digits, accents joined (NFC); glass, smollm2: real ones."""
    if kind in ("glass", "smollm2"):
        return AutoTokenizer.from_pretrained(cache_folder() / "models" / f"{kind}-teacher")
    backend = _pieces() if kind == "pieces" else _byte_level(kind)
    special = ["<think>", END[kind]] if kind != "pieces" else ["<unk>", "<s>", END[kind]]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    beside = {"unk_token": "<unk>", "bos_token": "<s>"} if kind == "pieces" else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END[kind], **beside)


def is_there(kind: str) -> bool:
    return kind not in ("glass", "smollm2") or (cache_folder() / "models" / f"{kind}-teacher").is_dir()


def _byte_level(kind: str) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d{1,3}" if kind == "numbers" else r"\d"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    if kind == "composed":
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = {"digits": 1500, "numbers": 3000, "composed": 800}[kind]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    numbers = [" ".join(str(n) for n in range(1000))] * 3
    backend.train_from_iterator([page.read_text(encoding="utf-8") for page in PAGES] + numbers, trainer)
    return backend


def _pieces() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    trainer = trainers.UnigramTrainer(vocab_size=600, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    backend.train_from_iterator((page.read_text(encoding="utf-8")[:4000] for page in PAGES), trainer)
    learnt = [(token, score) for token, score in _vocabulary(backend) if token != "<unk>"]
    fallback = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    backend.model = models.Unigram([("<unk>", 0.0), *fallback, *learnt], unk_id=0, byte_fallback=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _vocabulary(backend: Tokenizer) -> list[tuple[str, float]]:
    return [(token, score) for token, score in json.loads(backend.to_str())["model"]["vocab"]]


WORDS = ["the", "cat", "Zürich", "naïve", "über", "return", "int(x)", "==", "2024", "3.14", "“q”", "—", "½", "ﬁ"]
WORDS += ["тест", "ελληνικά", "مرحبا", "हिन्दी", "ไทย", "日本語", "漢字かな", "한국어"]
EMOJI = ["😀", "👩\u200d👩\u200d👧", "🇫🇷", "👍🏽", "❤️", "🏳️\u200d🌈", "1️⃣", "𝔘𝔫", "🜁"]
MARKS = [chr(code) for code in (0x300, 0x301, 0x308, 0x30A, 0x323, 0x327, 0x338, 0x20D7)]


def random_text(draw: random.Random) -> str:
    """Words of many scripts, emoji, digits, piled accents, lines, and blanks in front, between and behind."""
    parts = [" " * draw.choice([0, 0, 0, 1, 2, 5])]
    for _ in range(draw.randint(1, 16)):
        parts.append(draw.choice(_PARTS)(draw))
        parts.append(draw.choice(["", " ", " ", "  "]))
    return "".join(parts)


def _letters(draw: random.Random) -> str:
    ranges = [draw.randrange(32, 127), draw.randrange(0xA0, 0x2000), draw.randrange(0x1F300, 0x1F700)]
    letters = (chr(draw.choice(ranges)) for _ in range(draw.randint(1, 5)))
    return "".join(letter for letter in letters if unicodedata.category(letter)[0] != "C")


def _accents(draw: random.Random) -> str:
    letters = (draw.choice("abcegnou") + "".join(draw.sample(MARKS, draw.randint(0, 3))) for _ in range(4))
    return "".join(letters)


def _jamo(draw: random.Random) -> str:
    return unicodedata.normalize("NFD", "".join(chr(draw.randrange(0xAC00, 0xD7A4)) for _ in range(3)))


_PARTS = [
    lambda draw: draw.choice(WORDS),
    lambda draw: draw.choice(WORDS),
    lambda draw: draw.choice(EMOJI),
    lambda draw: str(draw.randrange(10 ** draw.randint(1, 20))),
    lambda draw: "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(draw.randint(1, 6))),
    lambda draw: draw.choice("-=*_.") * draw.randint(1, 8),
    lambda draw: "\n" * draw.randint(1, 3) + " " * draw.randint(0, 12),
    _letters,
    _accents,
    _jamo,
]
