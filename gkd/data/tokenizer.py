"""`eos_token`, `pad_token`, `chat_template_path`: options of `SFTConfig` about the tokenizer, before any row is read.

`SFTTrainer` applies them itself, but after the rows of this package have been rendered; and it would add the tokens of
another tokenizer to the student, which the teacher does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from gkd.models.loading import load_tokenizer


def apply_options(tokenizer: PreTrainedTokenizerBase, args: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, with `args.eos_token` as its end-of-sequence token, `args.pad_token` as its padding and the
    template of `args.chat_template_path`.

    Raises:
        ValueError: one of these tokens is not in the vocabulary; a template file that is missing, or a tokenizer whose
            template needs tokens that the student lacks.
    """
    if args.chat_template_path is not None:
        _take_template(tokenizer, args.chat_template_path, args.trust_remote_code)
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token is not None and token not in tokenizer.get_vocab():
            raise ValueError(f"{name}={token!r} is not in the vocabulary of the student's tokenizer")
        if token is not None:
            setattr(tokenizer, name, token)
    return tokenizer


def _take_template(tokenizer: PreTrainedTokenizerBase, path: str, trust_remote_code: bool) -> None:
    if path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise ValueError(f"chat_template_path={path!r}: there is no such file")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    try:
        source = load_tokenizer(path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"chat_template_path={path!r} is neither a .jinja file nor a folder or name of a tokenizer ({error})"
        ) from error
    if not source.chat_template:
        raise ValueError(f"chat_template_path={path!r}: that tokenizer has no chat template")
    known = tokenizer.get_vocab()
    new = [token.content for token in source.added_tokens_decoder.values() if token.content not in known]
    if new:
        raise ValueError(
            f"chat_template_path={path!r}: that tokenizer has {len(new)} special tokens which the student's lacks "
            f"({', '.join(new[:3])}), and the teacher would know nothing of tokens that are added: take the teacher's "
            "own template, or write one of plain text into a .jinja file"
        )
    tokenizer.chat_template = source.chat_template
    if source.eos_token in known:
        tokenizer.eos_token = source.eos_token


@contextmanager
def template_already_taken(args: Any) -> Iterator[None]:
    """Keep `SFTTrainer` from taking the template of `chat_template_path` a second time, and from adding its tokens."""
    path, args.chat_template_path = args.chat_template_path, None
    try:
        yield
    finally:
        args.chat_template_path = path


def check_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token.

    Raises:
        ValueError: a processor with images; only text is supported.
        TypeError: not a tokenizer.
    """
    if isinstance(tokenizer, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(tokenizer).__name__} (images or audio): only text is supported, "
            "pass its .tokenizer and a text-only model"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class is {type(tokenizer).__name__}: pass a tokenizer")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a pad nor an eos token: set tokenizer.eos_token")
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so sharing the id is harmless
    return tokenizer
