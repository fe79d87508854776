"""A verdict, and where in whose source a failure comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"


@dataclass(frozen=True)
class Result:
    """Attributes:
    verdict: "pass", "fail" or "not applicable".
    detail: what was found, in a few words; for "not applicable" why.
    """

    verdict: str
    detail: str


class NotApplicable(Exception):  # noqa: N818  (no error: it says that there is nothing to ask)
    """An adapter has not what a case asks about; the message says why."""


@dataclass(frozen=True)
class Case:
    """Attributes:
    name: the row of the table.
    group: the heading that it stands under.
    ask: the check itself.
    cheap: whether it belongs into the test suite (no training run, or one of a few steps).
    """

    name: str
    group: str
    ask: Callable[[Any], Result]
    cheap: bool = True

    def verdict(self, adapter: Any) -> Result:
        """Ask an adapter."""
        try:
            return self.ask(adapter)
        except NotApplicable as reason:
            return Result(NOT_APPLICABLE, str(reason))


@dataclass(frozen=True)
class Source:
    """A line of an installed distribution, found by what it says, so that it is the line of the version that ran.

    Attributes:
        file: path in the distribution.
        line: the line, or how it begins, without its indentation. after: a line that stands before it, for a text
            that is there more than once.
        why: what it does wrong, in a few words.
    """

    file: str
    line: str
    why: str
    after: str = ""

    def where(self, package: str) -> str:
        """file:line in the installed version.

        Raises:
            LookupError: it is not there any more.
        """
        lines = Path(str(distribution(package).locate_file(self.file))).read_text(encoding="utf-8").splitlines()
        seen = not self.after
        for number, text in enumerate(lines, 1):
            seen = seen or text.strip().startswith(self.after)
            if seen and text.strip().startswith(self.line):
                return f"{self.file}:{number}"
        raise LookupError(f"{package}: no line of {self.file} begins with {self.line!r}")


def judged(good: bool, detail: str) -> Result:
    """Pass or fail."""
    return Result(PASS if good else FAIL, detail)
