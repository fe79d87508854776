"""Text made short, or harmless for a terminal; seconds as text."""

from __future__ import annotations


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, an ellipsis where something was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """The text without characters that a terminal would obey: an escape sequence is shown, not carried out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """Seconds that were measured: `2 h 3 min`, `4 min 5 s`, `6.7 s`."""
    if seconds < 59.95:  # above, the rounded seconds would read 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def rough_duration(seconds: float) -> str:
    """Seconds that were estimated: `40 s`, `12 min`, `3 h 20 min`, `2 days 5 h`: two units at most."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"
