"""Keep secrets out of what is published: a command line and settings with access tokens and passwords replaced.

Two nets: names (`--hub_token`, `WANDB_API_KEY=`) and forms (an `hf_...` token, a password inside a URL, a JSON field).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "REDACTED"

_SECRET_NAME = re.compile(
    r"(^|[_\-.])(token|api[_\-]?key|access[_\-]?key|private[_\-]?key|secret([_\-]?key)?|password|passwd|credentials?)$",
    re.IGNORECASE,
)
_TOKENIZER_NAME = re.compile(r"(^|[_\-.])(bos|eos|pad|unk|sep|cls|mask|stop|image|end)[_\-]token$", re.IGNORECASE)
_SECRET_FORMS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), REDACTED),
    (re.compile(r"\b(sk|gh[pousr]|glpat|xox[abp])[-_][A-Za-z0-9_\-]{16,}"), REDACTED),
    (re.compile(r"(?i)\b(bearer)\s+[A-Za-z0-9._~+/=\-]{16,}"), rf"\1 {REDACTED}"),
    (re.compile(r"(://)[^/@\s:]*:[^/@\s]+@"), rf"\1{REDACTED}@"),
)
_JSON_FIELD = re.compile(r"""(["'])([\w.\-]+)\1(\s*:\s*)(["'])(.*?)\4""")


def is_secret_name(name: str) -> bool:
    """Whether a flag or field of this name holds a secret: `hub_token` does, `eos_token` and `max_new_tokens` not."""
    name = name.lstrip("-")
    return bool(_SECRET_NAME.search(name)) and not _TOKENIZER_NAME.search(name)


def redact_value(text: str) -> str:
    """Replace secrets that show by their form, wherever they stand in the text."""
    for pattern, replacement in _SECRET_FORMS:
        text = pattern.sub(replacement, text)
    return _JSON_FIELD.sub(_redact_field, text)


def _redact_field(match: re.Match[str]) -> str:
    quote, name, colon, value_quote, _ = match.groups()
    return f"{quote}{name}{quote}{colon}{value_quote}{REDACTED}{value_quote}" if is_secret_name(name) else match[0]


def redact_command(command: Sequence[str]) -> str:
    """The command as one shell line with every secret replaced; all else as it was given."""
    words, hide_next = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        if hide_next and not word.startswith("--"):
            words.append(REDACTED)
            hide_next = False
        elif equals and is_secret_name(name):
            words.append(f"{name}={REDACTED}")
        else:
            hide_next = word.startswith("-") and not equals and is_secret_name(word)
            words.append(redact_value(word))
    return shlex.join(words)


def without_secrets(state: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an object, to be pickled: fields that hold a secret are None, dictionaries are redacted."""
    hidden: dict[str, Any] = {name: None for name, value in state.items() if value and is_secret_name(name)}
    hidden |= {name: redact_settings(value) for name, value in state.items() if isinstance(value, dict)}
    return {**state, **hidden}


def redact_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with secrets replaced, in nested dictionaries and configurations (as dictionaries) too."""
    shown: dict[str, Any] = {}
    for name, value in settings.items():
        if value is not None and is_secret_name(str(name)):
            shown[name] = REDACTED
        elif isinstance(value, Mapping):
            shown[name] = redact_settings(value)
        elif hasattr(value, "to_dict"):
            shown[name] = redact_settings(value.to_dict())
        else:
            shown[name] = redact_value(value) if isinstance(value, str) else value
    return shown
