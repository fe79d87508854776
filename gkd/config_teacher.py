"""Which fields about the teacher go together. Level 1: `gkd.config` calls this, nothing here knows a model."""

from __future__ import annotations

from typing import Any


def check_teacher(config: Any) -> None:
    """Refuse a field about the teacher that is out of range, does not go with another, or would have no effect.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    checks: list[tuple[bool, str]] = []
    for wrong, text in checks:
        if wrong:
            raise ValueError(text)
