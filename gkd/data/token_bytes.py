"""The bytes that each id of a vocabulary stands for in running text: what two tokenizers have in common.

A token's name is not its text: byte-level vocabularies write a byte as a letter of their own (a blank as `Ġ`),
SentencePiece writes a blank as `▁` and a byte as `<0x0A>`. Bytes, not letters, because a token may end inside a
character.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

FIELD = "teacher_tokenizer_alignment"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REMEDY = f"without the bytes of its tokens there is no {FIELD}='bytes': let that teacher write only (seq_kd)"
# What a tokenizer must write as its tokens' bytes, up to the form of accents and a blank in front.
_PROBES = (
    "Two  cats, and 3,140 dogs.",
    "if x == 1:\n    return 'a\\tb'\n\n# Done!",
    "naïve façade — “déjà vu”",
    "日本語 и ελληνικά 한국어",
    "👩‍👩‍👧 🇫🇷 ok",
)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """What each id writes in the middle of a text; None for what writes none: special tokens, <unk>, unused ids.

    A token that is added to the vocabulary and not special (`<think>` in some) stands for its own text.

    Raises:
        ValueError: the tokenizer does not write a text as the bytes of its tokens: WordPiece, which loses the blanks,
            one that makes all letters small, one that is not a fast tokenizer.
    """
    spell = _speller(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    silent = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    ids = tokenizer.get_vocab()
    table: list[bytes | None] = [None] * (1 + max(ids.values()))
    for token, i in ids.items():
        if i not in silent:
            table[i] = spell(token, i in added)
    _check(tokenizer, table)
    return table


def spelled(table: Sequence[bytes | None], ids: Sequence[int]) -> list[bytes | None]:
    """The bytes of some ids; a row of the head behind the vocabulary stands for no text."""
    known = len(table)
    return [table[i] if i < known else None for i in ids]


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that is written for what the vocabulary lacks; None where nothing is lacking (byte-level).

    `unk_token` does not say it: many a byte-level tokenizer has its end of text there.
    """
    model = tokenizer.backend_tokenizer.model
    if type(model).__name__ == "Unigram":
        place: int | None = json.loads(model.__getstate__())["unk_id"]
        return place
    return None if model.unk_token is None else model.token_to_id(model.unk_token)


def is_byte_piece(token: str) -> bool:
    """Whether a token's name is SentencePiece's for one byte, which stands for what no other token can write."""
    return _BYTE_PIECE.fullmatch(token) is not None


def _speller(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, bool], bytes]:
    """How this tokenizer's names become bytes: a function of a name, and of whether that is an added token's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{_named(tokenizer)} is not a fast tokenizer, {_REMEDY}, or give it a tokenizer.json")
    model, parts = backend.model, _parts(backend.decoder) + _parts(backend.pre_tokenizer)
    kinds = {part["type"] for part in parts}
    if type(model).__name__ not in ("BPE", "Unigram") or "WordPiece" in kinds:
        raise ValueError(
            f"{_named(tokenizer)} is a {type(model).__name__} tokenizer, whose tokens do not say where blanks stand: "
            f"{_REMEDY}"
        )
    if getattr(model, "end_of_word_suffix", None) or getattr(model, "continuing_subword_prefix", None):
        raise ValueError(f"{_named(tokenizer)} marks the parts of words, and not where blanks stand: {_REMEDY}")
    if "ByteLevel" in kinds:
        letters = _byte_letters()
        return lambda token, added: token.encode() if added else _from_letters(token, letters)
    blank = next(iter(_blanks(parts)), None)
    has_bytes = bool(getattr(model, "byte_fallback", False)) or "ByteFallback" in kinds
    return lambda token, added: _from_piece(token, blank, has_bytes)


def _parts(component: Any) -> list[dict[str, Any]]:
    """The parts of a decoder or pre-tokenizer, as they stand in tokenizer.json."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return list(state.get("decoders") or state.get("pretokenizers") or [state])


def _blanks(parts: Sequence[dict[str, Any]]) -> list[str]:
    """The letters that stand for a blank."""
    metaspaces = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    replaced = [p["pattern"].get("String") for p in parts if p["type"] == "Replace" and p.get("content") == " "]
    return metaspaces + [letter for letter in replaced if letter]


def _byte_letters() -> dict[str, int]:
    """The letter that a byte-level vocabulary writes for each byte, GPT-2's: printable ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(moved)}


def _from_letters(token: str, letters: dict[str, int]) -> bytes:
    try:
        return bytes([letters[letter] for letter in token])
    except KeyError:  # as the decoder does
        return token.encode()


def _from_piece(piece: str, blank: str | None, has_bytes: bool) -> bytes:
    if has_bytes and (byte := _BYTE_PIECE.fullmatch(piece)):
        return bytes.fromhex(byte[1])
    return (piece.replace(blank, " ") if blank else piece).encode()


def _check(tokenizer: PreTrainedTokenizerBase, table: Sequence[bytes | None]) -> None:
    """Raises ValueError where the tokens of a text do not make up that text."""
    for text in _PROBES:
        pieces = spelled(table, tokenizer(text, add_special_tokens=False)["input_ids"])
        if None in pieces:
            continue  # an <unk>: it has no word for this
        written = b"".join(piece for piece in pieces if piece is not None).decode("utf-8", "replace")
        if unicodedata.normalize("NFC", written.removeprefix(" ")) != unicodedata.normalize("NFC", text):
            raise ValueError(f"{_named(tokenizer)} writes {text!r} as {written!r}: {_REMEDY}")


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{type(tokenizer).__name__} ({tokenizer.name_or_path or 'unnamed'})"
