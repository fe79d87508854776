"""Keep secrets out of what is published: a command line and settings with access tokens and passwords replaced.

Two nets. By name: a flag, field, header or URL parameter that is called `hub_token`, `apiKey` or `X-Amz-Signature`, in
any spelling of "name, then value": `--x v`, `x=v`, `x: v`, JSON and Python literals, escaped ones too, lists included.
By form: what shows wherever it stands, such as an `hf_...` token, a bearer header, or what is before the @ of a URL.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gkd.common.text import printable

REDACTED = "REDACTED"

_SECRET_NAME = re.compile(
    r"(^|[_\-./ ])(token|(api|auth|access|refresh|hub|hf|bearer|secret)_tokens"
    r"|(api|access|account|private|shared|secret)_?keys?(_id)?|secrets?|passwords?|passwd|pwd|passphrase|credentials?|authorization|auth|cookie)$",
    re.IGNORECASE,
)
# What a URL's parameters are called as well; elsewhere `key` and `sig` are ordinary words.
_SECRET_PARAMETER = re.compile(r"(^|_)(key|sig|signature|code|jwt|sas|access_id)$", re.IGNORECASE)
_TOKENIZER_NAME = re.compile(
    r"(^|[_\-.])(bos|eos|pad|unk|sep|cls|mask|stop|image|video|audio|begin|start|end|per|next|first|last|new|of)"
    r"[_\-]token$",
    re.IGNORECASE,
)
_IN_TEXT = r"[^\s\"'<>\\`]"
_SECRET_FORMS = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REDACTED),
    # Of a URL, everything from :// to the last @ before its path; the second form has a / in the password.
    (re.compile(r"(://)[^\s/?#\"'<>\\`]*@"), rf"\1{REDACTED}@"),
    (re.compile(rf"(://)[^\s/@:\"'<>\\`]*:(?!\d+(?:[/?#]|$)){_IN_TEXT}*@"), rf"\1{REDACTED}@"),
    (re.compile(r"(?<![\w.+%\-/])[\w.+%\-]+:[^\s/@:\"'\\]+@(?=[\w.\-]+(?::\d|/))"), f"{REDACTED}@"),
    (re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}"), REDACTED),
    (
        re.compile(
            r"\b(sk|rk|pk|gh[pousr]|github_pat|glpat|gldt|xox[a-z]|xapp|npm|pypi|nvapi|gsk|r8|dckr_pat|dop_v1|wandb_v1)"
            r"[-_](?=[A-Za-z_\-]*\d)[A-Za-z0-9_\-]{16,}"
        ),
        REDACTED,
    ),
    (re.compile(r"\b(A3T[A-Z0-9]|AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w\-]{30,}"), REDACTED),
    (re.compile(r"\bya29\.[\w\-]{16,}"), REDACTED),
    (re.compile(r"\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*"), REDACTED),
    (re.compile(r"(?i)\b(bearer|basic)(\s+|%20|\+)(?=\S*[\d+/=])[A-Za-z0-9._~+/=\-]{12,}"), rf"\1\2{REDACTED}"),
)
_QUOTE = r"\\*[\"']"
_OPENING = re.compile(_QUOTE)
_NAMED = re.compile(
    rf"(?:(?<![\w.\-])|(?=[?&;#]|%26))(?P<mark>[?&;#]|%26|--?)?(?P<quote>{_QUOTE})?(?P<name>[A-Za-z][\w.\-]*)(?P<close>{_QUOTE})?"
    r"(?P<gap>\s*(?:=>|==?|:|%3[Dd]|%3[Aa])\s*|\s+(?=\S))"
)
_BARE = re.compile(r"[^\s,;&#\"'\\\])}<>]+")
_NOTHING = frozenset({"none", "null", "true", "false", "~", REDACTED.lower(), "''", '""'})
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def is_secret_name(name: str) -> bool:
    """Whether a flag or field of this name holds a secret: `hub_token` does, `eos_token` and `max_new_tokens` not."""
    return bool(_SECRET_NAME.search(_words(name))) and not _TOKENIZER_NAME.search(_words(name))


def _words(name: str) -> str:
    """`accessToken` and `X-Api-Key` as `access_Token` and `X_Api_Key`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip("-_. ")).replace("-", "_")


def redact_value(text: str) -> str:
    """Replace secrets that show by their form or by the name before them, wherever they stand in the text."""
    for pattern, replacement in _SECRET_FORMS:
        text = pattern.sub(replacement, text)
    parts, done, at = [], 0, 0
    while found := _NAMED.search(text, at):
        span = _secret_at(text, found)
        if span is None:
            at = found.end("name")
            continue
        parts += [text[done : span[0]], REDACTED]
        done = at = span[1]
    return "".join([*parts, text[done:]])


def harmless(text: object) -> str:
    """What may go to a terminal or a log whoever wrote it: no secret in it, and no character that a terminal obeys."""
    return printable(redact_value(str(text)))


def _secret_at(text: str, found: re.Match[str]) -> tuple[int, int] | None:
    """Where the value stands that belongs to a name; None when it is no secret, or there is none."""
    name, gap, start = found["name"], found["gap"], found.end()
    in_url = (found["mark"] or "").startswith(("?", "&", ";", "#", "%"))
    secret = is_secret_name(name) or (in_url and bool(_SECRET_PARAMETER.search(_words(name))))
    flag = (found["mark"] or "").startswith("-")
    if not secret or (gap.isspace() and not (flag and text[start] != "-")):
        return None
    quoted = _OPENING.match(text, start)
    if quoted is not None:
        end, _ = _closing(text, quoted)
        return (quoted.end(), end) if text[quoted.end() : end] else None
    if text[start : start + 1] in _BRACKETS:
        return start, _behind_bracket(text, start)
    bare = _BARE.match(text, start)
    if bare is None or bare[0].strip(".").lower() in _NOTHING:
        return None
    header = re.sub(r"\W", "", gap) == "" and ":" in gap and _words(name).lower() in ("authorization", "cookie")
    if header:
        line = re.compile(r"[^\n\"'\\]+").match(text, start)
        return (start, line.end()) if line else None
    # Prose has colons, too ("The secret: patience"): there a value counts that no word of it could be.
    prose = found["quote"] is None and ":" in gap and not re.search(r"[_\-]", name)
    if prose and not (len(bare[0]) >= 6 and re.search(r"\d|[^\w.]", bare[0].rstrip(".!?"))):
        return None
    return start, bare.end()


def _behind_bracket(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`; the end of the text when none does. Brackets
    between quotes are text."""
    opening, depth, place = text[start], 0, start
    while place < len(text):
        quoted = _OPENING.match(text, place)
        if quoted is not None:
            place = _closing(text, quoted)[1]
            continue
        depth += (text[place] == opening) - (text[place] == _BRACKETS[opening])
        place += 1
        if depth == 0:
            return place
    return len(text)


def _closing(text: str, quoted: re.Match[str]) -> tuple[int, int]:
    """Where the text between quotes ends, and where its closing quote does; both the end of all text without one."""
    closing = re.compile(r"(?<!\\)" + re.escape(quoted[0])).search(text, quoted.end())
    return (len(text), len(text)) if closing is None else closing.span()


def redact_command(command: Sequence[str]) -> str:
    """The command as one shell line with every secret replaced; all else as it was given."""
    return shlex.join(redact_words(command))


def redact_words(command: Sequence[str]) -> list[str]:
    """The words of a command with every secret replaced, those behind a flag that names one included."""
    words: list[str] = []
    hide = False
    for word in command:
        name, equals, _ = word.partition("=")
        if hide and not word.startswith("--"):
            words.append(REDACTED)  # all that follows up to the next flag: a flag may take several words
        elif equals and is_secret_name(name):
            words.append(f"{name}={REDACTED}")
            hide = False
        else:
            hide = word.startswith("-") and not equals and is_secret_name(word)
            words.append(redact_value(word))
    return words


def redact_process_arguments() -> None:
    """Replace secrets in `sys.argv`: trackers (W&B among them) record a process's command line by themselves."""
    sys.argv[:] = redact_words(sys.argv)


def without_secrets(state: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an object, to be pickled: fields that hold a secret are None, texts are redacted."""
    return {
        name: (None if value else value) if is_secret_name(name) else _without_secrets(value)
        for name, value in state.items()
    }


def _without_secrets(value: Any) -> Any:
    """The same with secrets replaced in texts, dictionaries and lists; other objects are left as they are."""
    if type(value) is str:  # a str of another kind, such as an enumeration's, is no free text
        return redact_value(value)
    if type(value) is dict:
        return {
            name: REDACTED if item is not None and is_secret_name(str(name)) else _without_secrets(item)
            for name, item in value.items()
        }
    if type(value) in (list, tuple):
        words = redact_words(value) if value and all(type(item) is str for item in value) else value
        return type(value)(_without_secrets(item) for item in words)
    return value


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
            shown[name] = _without_secrets(value)
    return shown
